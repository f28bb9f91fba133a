"""Several adapters of one base combined into one, by PEFT's rules (`LoraModel.add_weighted_adapter`), without the base.

An adapter adds scaling x B A to a matrix. With weights w there are three families:

    cat              B = [B1 B2], A = [w1 s1 A1; w2 s2 A2]: the weighted sum itself, w1 s1 B1 A1 + w2 s2 B2 A2
    svd, ..._svd     the nearest B A of a lower rank to that sum, or to the matrices mixed in another way
    linear, ties ... A and B are mixed apart, with sqrt(w s) each, so that products of A1 and B2 come in: a rough
                     approximation, which needs one rank

Module by module, in float32; the numbers are those of PEFT's functions. What DARE leaves out is drawn with train.seed.
The scaling of the result is 1; PEFT 0.21 takes use_rslora over, and then serves it sqrt(r) times too strong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.model.adapter_file import AdapterFile, plain_name
from pipeline.model.adapter_folder import CONFIG, WEIGHTS, Adapter, read_given_adapter
from pipeline.model.plain_adapter import A, B, more_than_products
from pipeline.model.weights_file import WHOLE
from pipeline.model.weights_writer import TensorPlan, WeightsWriter

_4BIT = re.compile(r"(-unsloth)?-bnb-4bit$")


@dataclass(frozen=True)
class _Part:
    """What one adapter adds to a module: weight x scaling x B A."""

    a: Any
    b: Any
    scaling: float
    weight: float


def read_given_adapters(config: Config) -> list[Adapter]:
    """The adapters that a configuration gives.

    Raises:
        UserError: one cannot be used, or they cannot be combined.
    """
    adapters = [read_given_adapter(folder) for folder in config.given_adapters]
    if config.adapters:
        _refuse(config, adapters)
    return adapters


def _refuse(config: Config, adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if why := more_than_products(adapter.settings, adapter.weights.shapes):
            raise UserError(
                f"{adapter.folder}: {why}, and only products of two matrices can be combined: take this one alone "
                "(adapter.path)"
            )
    bases = {_name_of_base(adapter): adapter for adapter in adapters if adapter.named_base}
    if len(bases) > 1:
        one, other = list(bases.values())[:2]
        raise UserError(
            f"adapters: {one.folder} was trained on {one.named_base}, {other.folder} on {other.named_base}: only "
            "adapters of one base can be combined; where these are two names of the same model, write the same "
            f"base_model_name_or_path into both {CONFIG}"
        )
    way = config.adapter.combine
    if way == "cat" or way.endswith("svd"):
        return
    for module, having in _modules(adapters).items():
        ranks = [adapter.weights.shapes[stem + A][0] for adapter, stem in having]
        if len(set(ranks)) > 1:
            raise UserError(
                f'adapters: adapter.combine = "{way}" needs adapters of one rank, and {module} has '
                + " and ".join(f"{rank} in {adapter.folder}" for rank, (adapter, _) in zip(ranks, having, strict=True))
                + ': take "cat" or "svd"'
            )


def _name_of_base(adapter: Adapter) -> str:
    """A base's name without its owner or folder: copies and 4-bit versions of it are the same base."""
    return _4BIT.sub("", adapter.named_base.rstrip("/").rpartition("/")[2].lower())


def _modules(adapters: Sequence[Adapter]) -> dict[str, list[tuple[Adapter, str]]]:
    """Every module that is changed, by name: the adapters that do, and what the names of its tensors begin with."""
    found: dict[str, list[tuple[Adapter, str]]] = {}
    for adapter in adapters:
        for name in adapter.weights.shapes:
            if name.endswith(A):
                found.setdefault(plain_name(name).removesuffix(A), []).append((adapter, name.removesuffix(A)))
    return dict(sorted(found.items()))


def write_combined(
    config: Config, adapters: Sequence[Adapter], folder: Path, done: Callable[[float], None] = lambda share: None
) -> Adapter:
    """Write the combination as an adapter like any other, with a scaling of 1.

    Args:
        config: its adapters, adapter and train.seed.
        adapters: of `read_given_adapters`, each of the same base.
        folder: a new one.
        done: is told the share of the modules that are done.

    Raises:
        UserError: nothing is left of a module.
    """
    import torch

    way = config.adapter.combine
    modules = _modules(adapters)
    rank = _rank(config, adapters)
    weights = {adapter.folder: given.weight for adapter, given in zip(adapters, config.adapters, strict=True)}
    plans: dict[str, TensorPlan] = {}
    for having in modules.values():
        adapter, stem = having[0]
        plans[stem + A] = TensorPlan(WEIGHTS, "F32", (rank, adapter.weights.shapes[stem + A][1]))
        plans[stem + B] = TensorPlan(WEIGHTS, "F32", (adapter.weights.shapes[stem + B][0], rank))
    folder.mkdir(parents=True)
    with WeightsWriter(folder, plans) as writer, torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(config.train.seed)
        for number, (module, having) in enumerate(modules.items(), 1):
            parts = [_part(adapter, module, stem, weights[adapter.folder]) for adapter, stem in having]
            a, b = _combine(parts, way, config.adapter.density, rank)
            if not (a.any() and b.any()):
                raise UserError(
                    f"adapters: combined, nothing is left of them in {module}: give other weights, or a larger "
                    "adapter.density"
                )
            stem = having[0][1]
            writer.write(stem + A, 0, torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])))
            writer.write(stem + B, 0, torch.nn.functional.pad(b, (0, rank - b.shape[1])))
            done(number / len(modules))
    (folder / WHOLE).rename(folder / WEIGHTS)
    settings = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank},
        **{"target_modules": list(modules), "fan_in_fan_out": bool(adapters[0].settings.get("fan_in_fan_out"))},
        "base_model_name_or_path": next((adapter.named_base for adapter in adapters if adapter.named_base), None),
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return read_given_adapter(folder)


def _rank(config: Config, adapters: Sequence[Adapter]) -> int:
    """The combination's: of every module, filled up with zeros where there is less."""
    ranks = [
        max(shape[0] for name, shape in adapter.weights.shapes.items() if name.endswith(A)) for adapter in adapters
    ]
    return config.adapter.rank or (sum(ranks) if config.adapter.combine == "cat" else max(ranks))


def _part(adapter: Adapter, module: str, stem: str, weight: float) -> _Part:
    scaling = AdapterFile(adapter.folder, adapter.settings, adapter.weights).scaling(module)
    return _Part(adapter.weights[stem + A].float(), adapter.weights[stem + B].float(), scaling, weight)


def _combine(parts: Sequence[_Part], way: str, density: float | None, rank: int) -> tuple[Any, Any]:
    """A and B of one module, in float32."""
    import torch

    if way in ("cat", "svd"):
        a = torch.cat([part.a * part.weight * part.scaling for part in parts])
        b = torch.cat([part.b for part in parts], dim=1)
        return (a, b) if way == "cat" else _nearest(a, b, rank)
    if way.endswith("_svd"):
        changes = [part.b @ part.a * part.scaling for part in parts]
        mixed = _mix(changes, [part.weight for part in parts], way.removesuffix("_svd"), density)
        u, s, v = torch.linalg.svd(mixed, full_matrices=False)
        return v[:rank], u[:, :rank] * s[:rank]
    factors = [part.weight * part.scaling for part in parts]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]  # on one side alone
    a = _mix([part.a for part in parts], signed, way, density)
    return a, _mix([part.b for part in parts], roots, way, density)


def _nearest(a: Any, b: Any, rank: int) -> tuple[Any, Any]:
    """The nearest product of a lower rank to B A.

    B = Q R and A^T = P S make it Q (R S^T) P^T: what is decomposed has as few rows as the adapters have ranks.
    """
    import torch

    q, r = torch.linalg.qr(b)
    p, s = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(r @ s.T, full_matrices=False)
    return v[:rank] @ p.T, q @ (u[:, :rank] * values[:rank])


def _mix(tensors: list[Any], weights: list[float], way: str, density: float | None) -> Any:
    """PEFT's own functions."""
    import torch
    from peft.utils import merge_utils

    factors = torch.tensor(weights)
    if way == "linear":
        return merge_utils.task_arithmetic(tensors, factors)
    return getattr(merge_utils, way)(tensors, factors, density)


def difference(one: Adapter, other: Adapter) -> float:
    """How far two adapters are from adding the same: the largest relative difference of a module's scaling x B A.

    It is worked out without the products, which are as large as the base's matrices: X - Y is one product itself, of
    [B1 -B2] and [A1; A2].

    Raises:
        UserError: they change different modules.
    """
    import torch

    pairs = _modules([one, other])
    if alone := next((module for module, having in pairs.items() if len(having) != 2), None):
        raise UserError(f"{alone} is changed by one of {one.folder} and {other.folder} alone")
    largest = 0.0
    for module, having in pairs.items():
        x, y = (_part(adapter, module, stem, 1.0) for adapter, stem in having)
        a, b = torch.cat([x.a * x.scaling, y.a * y.scaling]), torch.cat([x.b, -y.b], dim=1)
        largest = max(largest, _norm(a, b) / max(_norm(x.a * x.scaling, x.b), 1e-30))
    return largest


def _norm(a: Any, b: Any) -> float:
    """The Frobenius norm of B A, by two small triangles in place of the product."""
    import torch

    return float(torch.linalg.norm(torch.linalg.qr(b.double())[1] @ torch.linalg.qr(a.double().T)[1].T))

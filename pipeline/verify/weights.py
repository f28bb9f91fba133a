"""weights: the merged model is the base plus scaling x B A in every targeted module, and the base everywhere else.

Recomputed in float32 from the files themselves, tensor by tensor, with no help from PEFT. The 16-bit GGUF file must
hold the same numbers: those that the pinned converter writes when it is run again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.console import progress
from pipeline.errors import PipelineError
from pipeline.llamacpp.gguf_file import GGUFInfo, inspect
from pipeline.llamacpp.gguf_file import check as check_gguf
from pipeline.model.adapter_file import Renaming, is_matrix, plain_name, renaming
from pipeline.model.config_file import text_config
from pipeline.model.layer_by_layer import Layers
from pipeline.model.load import load_model
from pipeline.model.memory import fits_float32
from pipeline.model.nf4 import Kept, Record
from pipeline.model.weights_file import BUFFERS, Weights, read_weights
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result

_MERGED = Claim("weights.merged", "merge", "every targeted module is the base plus scaling x B A, rounded once")
_TARGETS = Claim("weights.targets", "merge", "every module that should have an adapter has one")
_UNTOUCHED = Claim("weights.untouched", "merge", "nothing else differs from the base")
_SHAPES = Claim("weights.shapes", "merge", "names, shapes, ties and vocabulary are those of the base")
_LEFTOVERS = Claim("weights.leftovers", "merge", "nothing of the adapter or of 4-bit storage is left over")
_FINITE = Claim("weights.finite", "merge", "every weight is finite")
_RELOAD = Claim("weights.reload", "merge", "transformers loads the model with no weight missing or new")
_WHOLE = Claim("weights.file", "convert", "the 16-bit GGUF file is whole, and no tensor is NaN or all zeros")
_GGUF = Claim("weights.gguf", "convert", "the 16-bit GGUF file holds the merged model's numbers")
_METADATA = Claim("weights.metadata", "convert", "the GGUF file describes the model as its config.json does")

_LEFTOVER_SIGNS = ("lora_", "absmax", "quant_map", "quant_state", "bitsandbytes", ".SCB", "weight_format")
# Bits of the mantissa, and the distance between the smallest numbers.
_MANTISSA = {"F16": (10, 2.0**-24), "BF16": (7, 2.0**-133), "F32": (23, 2.0**-149)}
_CHANGES = ("rope", "scal", "softcap", "window", "epsilon")
# What config.json says that changes what a model computes.
_COMPUTES = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "rms_norm_eps", "layer_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "hidden_activation", "sliding_window",
    "layer_types", "attention_bias", "mlp_bias", "max_position_embeddings",
)  # fmt: skip


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge the merged folder and the 16-bit file."""
    if artefacts.removed:
        of_weights = (_MERGED, _TARGETS, _UNTOUCHED, _SHAPES, _LEFTOVERS, _FINITE, _RELOAD)
        yield from (claim.not_run(artefacts.removed) for claim in of_weights)
        yield from check_sixteen_bit(artefacts)
    else:
        yield from prove(artefacts)
        yield _reload(artefacts)


def prove(artefacts: Artefacts) -> Iterator[Result]:
    """What can be said of the merged weights, and of the 16-bit file against them, in bounded memory."""
    yield from check_merge(artefacts)
    yield from check_folder(artefacts)
    yield from check_sixteen_bit(artefacts)


def check_base(artefacts: Artefacts) -> Iterator[Result]:
    """A folder that nothing was merged into."""
    yield from check_folder(artefacts)
    yield _reload(artefacts)


def check_merge(artefacts: Artefacts) -> Iterator[Result]:
    """The merged folder against the base and the adapter."""
    import torch

    base_folder, adapter_folder = artefacts.base, artefacts.adapter
    if base_folder is None or adapter_folder is None:
        why = "the base and the adapter of this export are not known"
        yield from (claim.not_run(why) for claim in (_MERGED, _TARGETS, _UNTOUCHED, _SHAPES))
        return
    base, merged, adapter = (read_weights(folder) for folder in (base_folder, artefacts.model, adapter_folder))
    settings = json.loads((adapter_folder / "adapter_config.json").read_text(encoding="utf-8"))
    adapted = {
        plain_name(name).removesuffix(".lora_A.weight") for name in adapter.shapes if name.endswith(".lora_A.weight")
    }
    names_of = renaming(adapted, base)
    modules = {names_of.to_file(name) for name in adapted}
    trained = {names_of.to_file(plain_name(name)) for name in adapter.shapes if ".lora_" not in name}
    tokens = _tokens(adapter, names_of)
    matrices = {names_of.to_model(name.removesuffix(".weight")) for name in base.shapes if is_matrix(base, name)}
    yield _targets(matrices, adapted, settings)
    yield _same_shape(artefacts.model, base_folder, base, merged)

    stored = _MANTISSA
    worst, worst_words, wrong = 0.0, "", 0
    touched, touched_words = 0, ""
    limit = artefacts.settings.rounding
    record = Record.read(adapter_folder.parent)
    transposed = {names_of.to_file(name) for name in record.transposed}
    kept = Kept(base, record if artefacts.merged_into == "dequantized" else Record(), names_of)
    names = [name for name in base.shapes if merged.shapes.get(name) == base.shapes[name]]
    with torch.no_grad(), progress("weights", len(names), "tensors") as update:
        for number, name in enumerate(names, 1):
            module = name.removesuffix(".weight")
            if module in modules:
                turned = module in transposed
                weight = kept[name] if name in kept else base[name].float()
                found = merged[name].float()
                if turned:
                    weight, found = weight.T, found.T
                delta, expected = _expected(weight, names_of.to_model(module), adapter, settings)
                scale = torch.maximum(torch.maximum(weight.abs(), expected.abs()), delta.abs())
                error = float(((found - expected).abs() / _step(scale, *stored[merged.types[name]])).max())
                if not error <= limit:
                    wrong += 1
                    worst_words = worst_words or f"{module} {_how(found - weight, delta)}"
                worst = error if math.isnan(error) else max(worst, error)
            elif name in tokens:
                rows, values = _trained_rows(module, names_of, settings), adapter[tokens[name]]
                expected = base[name].clone()
                expected[rows] = values.to(expected.dtype)
                if not torch.equal(merged[name], expected.to(merged[name].dtype)):
                    wrong += 1
                    worst_words = worst_words or f"{name} is not the base's with the trained rows of the added tokens"
            elif name in trained:
                same = torch.equal(
                    merged[name].float(), _trained(adapter, names_of.to_model(name)).to(merged[name].dtype).float()
                )
                if not same:
                    wrong += 1
                    worst_words = worst_words or f"{name} is not what was trained"
            else:
                before = kept[name] if name in kept else base[name]
                if not torch.equal(merged[name], before.to(merged[name].dtype)):
                    touched += 1
                    touched_words = touched_words or f"{name} differs from the base, and no adapter changes it"
            update(number)
    if not modules & {name.removesuffix(".weight") for name in names}:
        yield _MERGED.holds(False, "no module of the adapter is among the merged weights")
    else:
        count = f" ({wrong} of {len(modules)} modules are wrong)" if wrong else ""
        ok = wrong == 0
        yield _MERGED.holds(ok, worst_words + count, worst, f"at most {limit:g} steps of rounding")
    yield _UNTOUCHED.at_most(touched, 0, touched_words)


def _tokens(adapter: Weights, names_of: Renaming) -> dict[str, str]:
    """The tensors of which single rows were trained, as the files name them, with the adapter's names of those rows."""
    end = ".token_adapter.trainable_tokens_delta"
    found = ((plain_name(name), name) for name in adapter.shapes if name.endswith(end))
    return {names_of.to_file(plain.removesuffix(end) + ".weight"): name for plain, name in found}


def _trained_rows(module: str, names_of: Renaming, settings: dict[str, Any]) -> list[int]:
    """The rows that `trainable_token_indices` names for a module; a list means the embedding."""
    given = settings["trainable_token_indices"]
    if isinstance(given, list):
        return given
    name = names_of.to_model(module)
    return next(rows for key, rows in given.items() if name == key or name.endswith(f".{key}"))


def _trained(adapter: Weights, name: str) -> Any:
    return next(adapter[full] for full in adapter.shapes if plain_name(full) == name)


def _expected(weight: Any, module: str, adapter: Weights, settings: dict[str, Any]) -> tuple[Any, Any]:
    """scaling x B A (E. Hu et al., 2021, "LoRA", section 4.1), and the weight that it makes of the base's."""
    import torch

    prefix = f"base_model.model.{module}"
    a, b = adapter[f"{prefix}.lora_A.weight"].float(), adapter[f"{prefix}.lora_B.weight"].float()
    delta = _scaling(module, settings) * (b @ a)
    expected = weight + delta
    if settings.get("use_dora"):  # S. Liu et al., 2024, "DoRA", equation 5
        magnitude = next(
            adapter[name].float() for name in adapter.shapes if name.startswith(f"{prefix}.lora_magnitude_vector")
        )
        expected = magnitude.reshape(-1, 1) / torch.linalg.norm(expected, dim=1, keepdim=True) * expected
        delta = expected - weight
    return delta, expected


def _scaling(module: str, settings: dict[str, Any]) -> float:
    def of(pattern: str, default: float) -> float:
        for key, value in (settings.get(pattern) or {}).items():
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return float(value)
        return default

    rank, alpha = of("rank_pattern", settings["r"]), of("alpha_pattern", settings["lora_alpha"])
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _step(scale: Any, mantissa: int, smallest: float) -> Any:
    """The distance between neighbouring numbers of a type at this size, or up to twice that.

    Example: float16 has 10 bits of mantissa. Between 1 and 2 its numbers are 2**-10 apart, and so is the step of 1; the
    step of 1.9 is nearly twice that. A sum that was rounded once is at most half a distance away.

    Args:
        scale: sizes of numbers, all positive.
        mantissa: bits of the type's mantissa.
        smallest: the distance between its smallest numbers, below which it cannot go.
    """
    return (scale * 2.0**-mantissa).clamp_(min=smallest)


def _how(change: Any, delta: Any) -> str:
    """What was done to a module instead of adding its delta once, in words.

    The change is split into a multiple of the delta and a rest at right angles to it. Examples: a multiple of 0 is a
    module that was not merged, 2 one that was merged twice, 0.5 one with half the scaling; a large rest is a change
    that the adapter does not make at all.
    """
    norm = float((delta * delta).sum())
    share = float((change * delta).sum()) / norm if norm else math.nan
    rest = float(((change - share * delta) ** 2).sum() / norm) ** 0.5 if norm else math.nan
    if math.isnan(share):
        return "is not finite" if norm else "has an adapter that changes nothing"
    if rest > 0.2:
        return (
            "differs from the base by something else than its adapter, as a module does that was merged into 4-bit "
            f"weights (the rest is {rest:.2f} times the adapter's change)"
        )
    if abs(share) < 0.05:
        return "is the base's: its adapter was not merged"
    if abs(share - 2) < 0.05:
        return "has its adapter twice"
    return f"has its adapter {share:.3f} times: another scaling than alpha / r"


def _targets(matrices: set[str], modules: set[str], settings: dict[str, Any]) -> Result:
    """Every module that the adapter's configuration means has an adapter, unless it leaves layers out."""
    wanted = settings.get("target_modules") or []
    if settings.get("layers_to_transform") or settings.get("exclude_modules"):
        return _TARGETS.not_run("the adapter leaves out modules by a pattern")
    if isinstance(wanted, str):
        should = {name for name in matrices if re.fullmatch(wanted, name)}
    else:
        should = {name for name in matrices if name.rpartition(".")[2] in wanted}
    missing = sorted(should - modules)
    words = f"{len(missing)} of {len(should)} modules have no adapter, the first is {missing[0]}" if missing else ""
    if not should:
        words = "the base has no module of the adapter's names"
    return _TARGETS.holds(not missing and bool(should), words, len(modules), len(should))


def _same_shape(model: Path, base_folder: Path, base: Weights, merged: Weights) -> Result:
    wrong = []
    ours, theirs = text_config(model), text_config(base_folder)
    for key in _COMPUTES:
        if ours.get(key) != theirs.get(key) and (key in ours or key not in ("rope_theta", "rope_scaling")):
            wrong.append(f"config.json: {key} is {ours.get(key)!r}, the base's {theirs.get(key)!r}")
    tied = bool(theirs.get("tie_word_embeddings", False))
    for name in sorted(base.shapes.keys() | merged.shapes.keys()):
        if name.endswith(BUFFERS) or (tied and name.endswith("lm_head.weight")):
            continue
        if merged.shapes.get(name) != base.shapes.get(name):
            wrong.append(f"{name} is {merged.shapes.get(name)}, the base's {base.shapes.get(name)}")
    if tied and "lm_head.weight" in merged.shapes:
        wrong.append("lm_head.weight is stored beside tied embeddings")
    return _SHAPES.holds(not wrong, "; ".join(wrong[:3]), len(wrong), "at most 0")


def check_folder(artefacts: Artefacts) -> Iterator[Result]:
    """What can be said of the folder alone."""
    import torch

    tensors = read_weights(artefacts.model)
    left = [name for name in tensors.shapes if any(sign in name for sign in _LEFTOVER_SIGNS)]
    odd = [f"{name} is stored as {kind}" for name, kind in tensors.types.items() if kind not in _MANTISSA]
    if "quantization_config" in text_config(artefacts.model):
        left.insert(0, "quantization_config in config.json")
    yield _LEFTOVERS.holds(not left and not odd, "; ".join([*left[:3], *odd[:3]]), len(left) + len(odd), "at most 0")
    broken = [
        name for name, kind in tensors.types.items() if kind in _MANTISSA and not torch.isfinite(tensors[name]).all()
    ]
    yield _FINITE.at_most(len(broken), 0, f"{broken[0]} holds NaN or infinity" if broken else "")


def _reload(artefacts: Artefacts) -> Result:
    """Build the model without weights and compare what it wants with what is stored."""
    import torch
    from transformers import AutoConfig

    float32 = fits_float32(artefacts.model)
    try:
        layers = None if float32 else Layers(read_weights(artefacts.model))
        if layers is not None and not layers.lacking:
            model, report = layers.model, {"unexpected keys": layers.unused, "mismatched keys": layers.misshapen}
        else:  # transformers keeps some models otherwise than their files do
            model, report = load_model(artefacts.model, torch.float32 if float32 else "auto", output_loading_info=True)
    except Exception as error:
        return _RELOAD.holds(False, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    if float32:  # the logits are taken from it later
        artefacts.shared["model"] = model.eval()
    wrong = [f"{key.replace('_', ' ')}: {sorted(map(str, names))[0]}" for key, names in report.items() if names]
    config = AutoConfig.from_pretrained(artefacts.model)
    text = config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if text.tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        wrong.append("the head is not tied to the embedding, as config.json says")
    if embedding.weight.shape[0] != text.vocab_size:
        wrong.append(f"{embedding.weight.shape[0]} embeddings for a vocabulary of {text.vocab_size}")
    if len(artefacts.tokenizer) > embedding.weight.shape[0]:
        wrong.append(f"{len(artefacts.tokenizer)} tokens for {embedding.weight.shape[0]} embeddings")
    return _RELOAD.holds(not wrong, "; ".join(wrong[:3]), len(wrong), "at most 0")


def check_sixteen_bit(artefacts: Artefacts) -> Iterator[Result]:
    """The unquantized GGUF file against the folder; metadata of every file."""
    if artefacts.sixteen_bit is None:
        why = "there is no unquantized GGUF file"
        yield _WHOLE.not_run(why)
        yield _GGUF.not_run(why)
    else:
        broken = _complaint(lambda: check_gguf(artefacts.sixteen_bit))  # type: ignore[arg-type]
        yield _WHOLE.holds(not broken, broken)
        if "cut short" in broken or "not a GGUF" in broken:
            yield _GGUF.not_run("the file is not whole")
            return
        if artefacts.removed:
            yield _GGUF.not_run(artefacts.removed)
        else:
            yield _same_numbers(inspect(artefacts.sixteen_bit), artefacts.expected)
    for stage, path in artefacts.files:
        if not (broken := _complaint(lambda path=path: inspect(path))):  # type: ignore[misc]
            yield _same_description(stage, inspect(path), artefacts.expected)
        elif stage != "convert":
            yield Claim(_METADATA.id, stage, _METADATA.sentence).not_run(broken)


def _complaint(call: Callable[[], Any]) -> str:
    try:
        call()
    except PipelineError as error:
        return str(error)
    return ""


def _same_numbers(info: GGUFInfo, expected: GGUFInfo) -> Result:
    wrong = []
    if missing := sorted(expected.names.keys() ^ info.names.keys()):
        wrong.append(f"{len(missing)} tensors are missing or new, e.g. {missing[0]}")
    with progress("the GGUF file's numbers", len(expected.tensors), "tensors") as update:
        for number, tensor in enumerate(expected.tensors, 1):
            found = info.names.get(tensor.name)
            if found is None:
                continue
            if found.shape != tensor.shape:
                wrong.append(f"{tensor.name} has the shape {found.shape} instead of {tensor.shape}")
                continue
            pieces = zip(info.pieces(found), expected.pieces(tensor), strict=True)
            if not all(_equal(ours, theirs) for ours, theirs in pieces):
                wrong.append(f"{tensor.name} {_difference(info.values(found), expected.values(tensor))}")
            update(number)
    return _GGUF.holds(not wrong, "; ".join(wrong[:3]), len(wrong), "at most 0 tensors")


def _equal(ours: Any, theirs: Any) -> bool:
    """Equal numbers; NaN in both is another check's finding."""
    import numpy as np

    return np.array_equal(ours, theirs) or np.array_equal(ours, theirs, equal_nan=True)


def _difference(ours: Any, theirs: Any) -> str:
    import numpy as np

    count = int((ours != theirs).sum())
    if count > 1 and np.array_equal(np.sort(ours, axis=None), np.sort(theirs, axis=None)):
        return "holds the right numbers in another order: it is permuted wrongly"
    if not ours.any():
        return "holds nothing but zeros"
    if not np.isfinite(ours).all():
        return "holds NaN or infinity"
    at = tuple(int(place) for place in np.argwhere(ours != theirs)[0])
    return f"differs in {count:,} numbers, first at {list(at)}: {ours[at]:g} instead of {theirs[at]:g}"


def _same_description(stage: str, info: GGUFInfo, expected: GGUFInfo) -> Result:
    """The keys of the architecture: sizes, rope, norms."""
    prefix = f"{expected.architecture}."
    # Another version's converter may write keys more; only those that change what is computed matter then.
    keys = {key for key in expected.metadata if key.startswith(prefix) and "vocab" not in key} | {
        key for key in info.metadata if key.startswith(prefix) and any(sign in key for sign in _CHANGES)
    }
    found, right = (of.metadata | of.implied for of in (info, expected))
    wrong = [
        f"{key} is {found.get(key)} instead of {right.get(key)}"
        for key in sorted(keys)
        if not _near(found.get(key), right.get(key))
    ]
    if info.architecture != expected.architecture:
        wrong.insert(0, f"general.architecture is {info.architecture} instead of {expected.architecture}")
    claim = Claim(_METADATA.id, stage, _METADATA.sentence)
    return claim.holds(not wrong, "; ".join(wrong[:3]), len(wrong), "at most 0 keys")


def _near(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)

"""An adapter that somebody trained elsewhere, judged: whether it is whole, understood, and of this base.

An adapter is a few matrices and a file of settings, adapter_config.json, without which they mean nothing. One rule for
the settings: a key that is not understood here is refused where it is on, because it could change the numbers, and is
named where it is off. Which tensors there should be is asked of PEFT itself, on a model without weights:

    adapter = read_given_adapter(Path("their-adapter"))   # the folder alone
    fit = fit_to(adapter, base)                     # against a base; nothing of the base's weights is read
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.adapter_file import AdapterFile, refuse_half_of_a_pair
from pipeline.model.base import is_hub_id
from pipeline.model.nf4 import Record
from pipeline.model.packaged import PACKAGED
from pipeline.model.targets import names_for, vocabulary_modules, without_weights
from pipeline.model.weights_file import read_weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# What decides the numbers, and is taken over by the merge and by the checks.
_UNDERSTOOD = frozenset(
    {
        "peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
        "modules_to_save", "init_lora_weights", "trainable_token_indices", "ensure_weight_tying",
    }
)  # fmt: skip
# What says where it is from or how it was trained, and changes no number of what was saved.
_OF_NO_CONSEQUENCE = frozenset(
    {
        "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "lora_dropout",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "runtime_config",
        "qalora_group_size", "merge_weights", "unsloth_fixed",
    }
)  # fmt: skip
# Ways to begin a training that leave the base as it is; the others move part of it into the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_REASONS = {
    "layer_replication": "it repeats layers of the base, which gives another model",
    "alora_invocation_tokens": "it works only after certain tokens, so that it cannot become part of the weights",
    "target_parameters": "it changes tensors of experts, which is not merged here",
    "lora_bias": "it adds a bias to modules of which the base may have none",
}
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
_STORED = ("F16", "BF16", "F32")
OF_MLX = "adapters.safetensors"  # the one file of tensors in an adapter of MLX
_MLX = (
    "is an adapter of MLX, whose tensors have other names and shapes: `pipeline export --adapter DIR --base MODEL` "
    "writes it as one of PEFT into the folder that it makes"
)


class Adapter(AdapterFile):
    """An adapter's folder of which nothing is wrong by itself."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What should be known of it, in sentences."""
        from dataclasses import fields
        from importlib.metadata import version

        from peft import LoraConfig

        known = {field.name for field in fields(LoraConfig)} | _OF_NO_CONSEQUENCE
        unknown = sorted(self.settings.keys() - known)
        words = f"{CONFIG} has keys that PEFT {version('peft')} does not know, all off: {', '.join(unknown)}"
        return (words,) if unknown else ()

    @property
    def named_base(self) -> str:
        """The base as the adapter names it: a hub id, or a path on the machine where it was trained; or ""."""
        return str(self.settings.get("base_model_name_or_path") or "")


@dataclass(frozen=True)
class Fit:
    """What an adapter is on one base.

    Attributes:
        modules: the names of the modules that have one, in the model's order.
        settings: adapter_config.json as every later stage reads it: the modules named exactly, nothing else in it.
        record: how the base's modules are, for the merge.
        remarks: what should be known, in sentences.
    """

    modules: tuple[str, ...]
    settings: dict[str, Any]
    record: Record
    remarks: tuple[str, ...] = ()


def read_given_adapter(folder: Path) -> Adapter:
    """Read a folder's settings and the headers of its tensors, without a heavy library.

    Raises:
        UserError: it is no adapter that can be merged, and why.
    """
    if not folder.is_dir():
        what = "is a file; give the folder that it is in" if folder.is_file() else "no such folder"
        raise UserError(f"{folder}: {what}")
    settings, path = _settings(folder), _weights(folder)
    weights = read_weights(folder, [path])
    if odd := [f"{name} is stored as {kind}" for name, kind in weights.types.items() if kind not in _STORED]:
        raise UserError(f"{path}: {odd[0]}: an adapter is stored in 16 or 32 bits")
    strange = [name for name in weights.shapes if not name.startswith(_PREFIX)]
    if strange:
        raise UserError(f"{path}: {strange[0]}: no name that PEFT gives ({_PREFIX}...); save it with `save_pretrained`")
    return Adapter(folder, settings, weights)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: {_no_adapter(folder)}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no settings")
    if "lora_parameters" in settings or ("peft_type" not in settings and (folder / OF_MLX).is_file()):
        raise UserError(f"{folder}: {_MLX}")
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type = {kind!r}: only LoRA can become part of the weights")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{path}: task_type = {task!r}: only an adapter of a causal language model can be served")
    _check_values(path, settings)
    for key, value in settings.items():
        if key not in _UNDERSTOOD | _OF_NO_CONSEQUENCE and _is_on(value):
            why = _REASONS.get(key, "it is not known here, and could change the numbers")
            raise UserError(f"{path}: {key} = {json.dumps(value)[:80]}: {why}; merge it where it was trained")
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{path}: init_lora_weights = {start!r}: such a start moves a part of the base's weights into the adapter, "
            "which would be there twice: save it where it was trained with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), which makes a plain adapter of it"
        )
    return settings


def _no_adapter(folder: Path) -> str:
    """What a folder without adapter_config.json is, and what to give instead."""
    if inside := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
        return f"holds adapters in folders of its own ({', '.join(inside[:4])}): give one of them"
    if (folder / "config.json").is_file():
        return "is a whole model, into which nothing is left to be merged: give the adapter's folder"
    if (folder / OF_MLX).is_file():
        return _MLX
    if list(folder.glob("*.gguf")):
        return "holds GGUF files, which cannot be turned back: give the folder that PEFT saved"
    if list(folder.glob("adapter_model.*")):
        return f"has no {CONFIG}, without which its tensors mean nothing: copy it from where the adapter was saved"
    return f"holds no adapter: give the folder with {CONFIG} and {WEIGHTS}"


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():
        if pickles := [name for name in _PICKLES if (folder / name).is_file()]:
            raise UserError(
                f"{folder}: has its weights only as {pickles[0]}, a pickle, which can run code when it is read: load "
                "it where you trust it, and save it with save_pretrained(..., safe_serialization=True)"
            )
        raise UserError(f"{folder}: {WEIGHTS} is missing: copy it from where the adapter was saved")
    try:
        with path.open("rb") as file:
            start = file.read(20)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if start.startswith(b"version https://git"):
        raise UserError(f"{path}: is a pointer of Git LFS, not the file: type `git lfs pull` where it was cloned")
    return path


def _check_values(path: Path, settings: dict[str, Any]) -> None:
    """The numbers of a scaling are numbers, above 0."""
    for key, whole in (("r", True), ("lora_alpha", False)):
        patterns = settings.get("rank_pattern" if whole else "alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{path}: {'rank' if whole else 'alpha'}_pattern = {patterns!r}: must be a table")
        for name, value in ((key, settings.get(key)), *patterns.items()):
            number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise UserError(f"{path}: {name} = {json.dumps(value)}: must be a number above 0")
    if settings.get("bias", "none") not in ("none", "all", "lora_only"):
        raise UserError(f"{path}: bias = {settings['bias']!r}: one of none, all, lora_only")


def _is_on(value: Any) -> bool:
    """Whether a setting is anything but left out; a table of settings that are all off is."""
    return any(map(_is_on, value.values())) if isinstance(value, dict) else bool(value)


def base_of(adapter: Adapter) -> str:
    """The base that an adapter names, as `resolve_base` takes it.

    Raises:
        UserError: it names none, or one that is on another machine.
    """
    named = adapter.named_base
    if not named:
        raise UserError(f"{adapter.folder / CONFIG}: names no base: give the one that it was trained on (--base)")
    if Path(named).expanduser().is_dir() or named.lower() in PACKAGED or is_hub_id(named):
        return named
    raise UserError(
        f"{adapter.folder / CONFIG}: names its base by a path that is not on this machine ({named}): give the base "
        "that it was trained on (--base)"
    )


def fit_to(adapter: Adapter, base: Path, *, in_4bit: bool = False, trust_remote_code: bool = False) -> Fit:
    """Hold an adapter against a base: every tensor has its place, every place its tensor, and all of them are finite.

    Args:
        adapter: of `read_given_adapter`.
        base: the base's folder.
        in_4bit: it was trained on the base in 4 bits, which the base is not stored in.
        trust_remote_code: run the base's own Python code.

    Raises:
        UserError: it is not an adapter of this base, or not one that can be merged into it.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    model = without_weights(base, trust_remote_code=trust_remote_code)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear | Conv1D)}
    head = next((name for name, module in linear.items() if module is model.get_output_embeddings()), "")
    embedding, own_head = vocabulary_modules(model)
    names = [name for name, _ in model.named_modules()]  # before PEFT puts its own among them
    rows = model.get_input_embeddings().weight.shape[0]
    _refuse_embeddings(adapter, (embedding, head), tied=not own_head, rows=rows)
    _compare(adapter, _expected(adapter, model, base), base)
    _check_numbers(adapter)
    found = {_module(name) for name in adapter.weights.shapes if ".lora_" in name}
    modules = tuple(name for name in names if name in found)
    kept = {key: value for key, value in adapter.settings.items() if key in _UNDERSTOOD}
    left_out = ("exclude_modules", "layers_to_transform", "layers_pattern")
    settings = {key: value for key, value in kept.items() if key not in left_out}
    # The modules by name: what chose them was judged here, and need be understood by nothing that comes after.
    settings |= {"target_modules": names_for(modules, names), "init_lora_weights": True, "inference_mode": True}
    record = Record(
        in_4bit=frozenset(linear.keys() - {head}) if in_4bit else frozenset(),
        transposed=frozenset(name for name, module in linear.items() if isinstance(module, Conv1D)),
    )
    return Fit(modules, settings, record)


def write_taken(adapter: Adapter, fit: Fit, tokenizer: Any, folder: Path, base: str) -> None:
    """Write an adapter down as training leaves its own; beside it, how the base's modules are.

    Args:
        adapter: of `read_given_adapter`.
        fit: what it is on the base.
        tokenizer: the one that it is served with, of transformers.
        folder: a new one.
        base: the base's name, for those who load the adapter.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(adapter.folder / WEIGHTS, folder / WEIGHTS)
    settings = fit.settings | {"base_model_name_or_path": base}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    fit.record.write(folder.parent)


def _module(name: str) -> str:
    """The module of the model that one of an adapter's tensors belongs to."""
    return name.removeprefix(_PREFIX).partition(".lora_")[0]


def _whole_module(name: str) -> str:
    """The module whose weight a tensor replaces, or has an addition to."""
    plain = re.sub(r"(\.modules_to_save(\.default)?)?\.weight$", "", name.removeprefix(_PREFIX))
    return plain.partition(".lora_")[0]


def _refuse_embeddings(adapter: Adapter, pair: tuple[str, str], *, tied: bool, rows: int) -> None:
    """Added tokens, and what a merge would change twice or not at all."""
    for name, shape in adapter.weights.shapes.items():
        module = _whole_module(name)
        if module in pair and ".lora_" not in name and shape[0] != rows:
            raise UserError(
                f"{adapter.folder}: {name} has {shape[0]:,} rows, the base's {rows:,}: its vocabulary was changed "
                "before training. Give the base the same tokens in the same order (model.add_tokens), or change it in "
                f"the same way (model.resize_token_embeddings({shape[0]})), save it with the adapter's tokenizer, and "
                "give that folder as the base"
            )
        if "lora_embedding_" in name or name.endswith(".base_layer.weight"):  # PEFT saves the latter beside the former
            raise UserError(
                f"{adapter.folder}: {name}: LoRA on an embedding or on the head is not merged here; merge it with PEFT"
            )
    changed = [name for name in adapter.weights.shapes if _whole_module(name) in pair]
    refuse_half_of_a_pair(adapter.folder, adapter.settings, changed if tied else ())


def _expected(adapter: Adapter, model: Any, base: Path) -> dict[str, tuple[int, ...]]:
    """The tensors that PEFT saves of such an adapter on this base: name -> shape."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    settings = {key: value for key, value in adapter.settings.items() if key in _UNDERSTOOD - {"peft_type"}}
    try:
        if isinstance(settings.get("target_modules"), list):
            settings["target_modules"] = sorted(set(settings["target_modules"]))
        with torch.device("meta"):
            whole = get_peft_model(model, LoraConfig(**{**settings, "init_lora_weights": False}))
    except Exception as error:  # of whatever kind: the settings are somebody else's
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{adapter.folder / CONFIG}: PEFT makes no adapter of it on {base}: {reason}") from None
    tensors = get_peft_model_state_dict(whole, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _compare(adapter: Adapter, expected: dict[str, tuple[int, ...]], base: Path) -> None:
    found, where = adapter.weights.shapes, adapter.folder
    named = f" (it names {adapter.named_base})" if adapter.named_base else ""
    both = [name for name in expected if name in found]
    if not both:
        raise UserError(
            f"{where}: none of its {len(found)} tensors has a place in {base}: {min(found)} is there, {min(expected)} "
            f"would be right: it was trained on another model{named}"
        )
    for name in both:
        ours, theirs = found[name], expected[name]
        if ours == theirs:
            continue
        rank = 0 if ".lora_A." in name else 1
        others = len(ours) == len(theirs) == 2 and ours[1 - rank] == theirs[1 - rank]
        if ".lora_" in name and others:
            raise UserError(
                f"{where}: {name} has rank {ours[rank]}, and {CONFIG} says {theirs[rank]} (r, rank_pattern): the two "
                "are not of one training"
            )
        raise UserError(f"{where}: {name} is {ours}, on {base} it would be {theirs}: it was trained on another{named}")
    if extra := [name for name in found if name not in expected]:
        raise UserError(
            f"{where}: {base} has no place for {extra[0]} ({len(extra)} of {len(found)} tensors): {CONFIG} does not "
            f"mean it, or it was trained on another model{named}"
        )
    if missing := [name for name in expected if name not in found]:
        raise UserError(
            f"{where}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}: copy the "
            "adapter again, from where it was saved"
        )


def _check_numbers(adapter: Adapter) -> None:
    """Every number is finite, and every module is changed."""
    import torch

    for name in adapter.weights.shapes:
        tensor = adapter.weights[name]
        if not torch.isfinite(tensor).all():
            raise UserError(f"{adapter.folder}: {name} holds NaN or infinity: take an earlier checkpoint")
        if re.search(r"\.lora_[AB]\.", name) and not tensor.any():
            raise UserError(
                f"{adapter.folder}: {name} is all zeros: the adapter changes nothing there, as before its first step; "
                "take a later checkpoint"
            )

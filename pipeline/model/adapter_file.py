"""A PEFT adapter's folder: what its configuration says, and where in a base's files its tensors belong.

The names of an adapter are those of the loaded model. transformers renames the parts of some models as it loads them,
so that the files may have another beginning: "language_model.model.layers" for "model.layers".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.targets import OTHER_SENSES
from pipeline.model.weights_file import Weights, read_weights

_OUTER = "base_model.model."
_EXPERT = re.compile(r"\.experts\.\d+\.")  # a module in the files; in the loaded model all of a layer are one tensor
# The matrices of each expert that such a tensor is made of, one after the other (transformers' conversion_mapping.py).
_JOINED = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj", "w2"),
}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter.

    Attributes:
        folder: where it is.
        settings: adapter_config.json.
        weights: its tensors.
    """

    folder: Path
    settings: dict[str, Any]
    weights: Weights

    @cached_property
    def plain(self) -> dict[str, str]:
        """Its tensors by the names that they have in the loaded model, PEFT's own wrappings taken off."""
        return {plain_name(name): name for name in self.weights.shapes}

    def scaling(self, module: str) -> float:
        """What B A is multiplied with: alpha / r (E. Hu et al., 2021, "LoRA", section 4.1).

        With use_rslora it is alpha / sqrt(r) (D. Kalajdzievski, 2023, "rsLoRA"). rank_pattern and alpha_pattern give
        single modules others.
        """
        rank, alpha = self._of("rank_pattern", module, "r"), self._of("alpha_pattern", module, "lora_alpha")
        return float(alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank)

    def _of(self, pattern: str, module: str, default: str) -> Any:
        for key, value in (self.settings.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return self.settings[default]

    def meant(self, modules: Iterable[str]) -> list[str]:
        """Those of a loaded model's linear modules that the configuration gives an adapter."""
        wanted, without = self.settings.get("target_modules") or [], self.settings.get("exclude_modules") or []
        layers = self.settings.get("layers_to_transform")
        numbers = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
        pattern = self.settings.get("layers_pattern") or r"[^.]*"
        inside = "|".join([pattern] if isinstance(pattern, str) else pattern)

        def chosen(name: str) -> bool:
            if not _matches(wanted, name) or _matches(without, name) or _EXPERT.search(name):
                return False
            layer = re.match(rf".*\.({inside})\.(\d+)\.", name) if numbers is not None else None
            return numbers is None or (layer is not None and int(layer[2]) in numbers)

        return [name for name in modules if chosen(name)]


def read_adapter(folder: Path) -> AdapterFile:
    """Read an adapter's configuration, and the headers of its tensors.

    Raises:
        UserError: one of them is missing or damaged.
    """
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: adapter_config.json cannot be read: {error}") from None
    return AdapterFile(folder, settings, read_weights(folder))


def plain_name(name: str) -> str:
    """An adapter's tensor by the name that its module has in the loaded model."""
    name = name.removeprefix(_OUTER)
    return name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def refuse_half_of_a_pair(folder: Path, settings: dict[str, Any], changed: Iterable[str]) -> None:
    """Refuse what changes one of an embedding and a head that are one tensor (tied), but for what trained them as one.

    Args:
        folder: the adapter's.
        settings: adapter_config.json.
        changed: the adapter's tensors that change all of an embedding or of a head; single tokens are kept as one.

    Raises:
        UserError: merged, the other would change too.
    """
    if (names := list(changed)) and not settings.get("ensure_weight_tying"):
        raise UserError(
            f"{folder}: {names[0]}: the base's head is its embedding, and the adapter changes one of the two: merged, "
            "both would change. Train with both as one (lora.save_modules, or PEFT's ensure_weight_tying), or on a "
            "base whose head is a tensor of its own"
        )


@dataclass(frozen=True)
class Renaming:
    """What names begin with in the files, and in the loaded model; both "" where they are equal."""

    stored: str = ""
    loaded: str = ""

    def to_file(self, name: str) -> str:
        """A loaded model's name as the files have it."""
        return self.stored + name.removeprefix(self.loaded) if name.startswith(self.loaded) else name

    def to_model(self, name: str) -> str:
        """A name of the files as the loaded model has it."""
        return self.loaded + name.removeprefix(self.stored) if name.startswith(self.stored) else name


def renaming(modules: Iterable[str], base: Weights) -> Renaming:
    """How the names of a loaded model's modules begin in a base's files.

    Example: "transformer.h.0.attn.c_attn" is "h.0.attn.c_attn" in the files of GPT-2, and ends there as no other does.
    """
    for module in sorted(modules):
        if f"{module}.weight" in base.shapes:
            continue
        parts = module.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        for start in (*range(1, numbers[0] + 1), 0) if numbers else ():
            end = ".".join(parts[start:])
            found = [
                name
                for name in base.shapes
                if f".{name}".endswith(f".{end}.weight") and not OTHER_SENSES.search(name) and is_matrix(base, name)
            ]
            if len(found) == 1:
                return Renaming(found[0].removesuffix(f"{end}.weight"), module.removesuffix(end))
    return Renaming()


def stored_as(name: str, base: Weights, names: Renaming) -> tuple[str, ...]:
    """The tensors of a base's files whose numbers, one after the other, are those of one of the loaded model.

    Args:
        name: in the loaded model.
        base: the files.
        names: of `renaming`.

    Returns:
        One; of a tensor of experts each expert's; () where the files have it otherwise.
    """
    stored = names.to_file(name)
    for same in (stored, stored.replace(".mlp.", ".block_sparse_moe.")):  # as Mixtral's files call a mixture
        if same in base.shapes:
            return (same,)
    joined = re.fullmatch(r"(?P<layer>.*?\.\d+\.).*\bexperts\.(?P<kind>\w+)", stored)
    if joined is None or joined["kind"] not in _JOINED:
        return ()
    kinds = _JOINED[joined["kind"]]
    each = re.compile(rf".*\.experts\.(\d+)\.({'|'.join(kinds)})\.weight")
    of_layer = (other for other in base.shapes if other.startswith(joined["layer"]))
    found = [match for other in of_layer if (match := each.fullmatch(other))]
    return tuple(match[0] for match in sorted(found, key=lambda match: (int(match[1]), kinds.index(match[2]))))


def is_matrix(tensors: Weights, name: str) -> bool:
    """Whether a tensor is a module's matrix."""
    return name.endswith(".weight") and len(tensors.shapes[name]) == 2


def _matches(wanted: str | list[str], name: str) -> bool:
    """PEFT's rule: a text is a regular expression for the whole name, a list has full names and what names end with."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)

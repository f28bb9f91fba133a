"""A base that bitsandbytes has stored in 4 bits, and the 16-bit weights that an adapter on it was trained with.

Beside a packed weight its file holds what unpacks it: scales, the code, and their types. Only training reads such a
folder as it is; everything else is given its weights unpacked, tensor by tensor.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.model.weights_file import Weights

# What stands beside a packed weight: "NAME.weight.absmax" and the like.
PART = re.compile(r"^(.*\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$")


def is_4bit(folder: Path) -> bool:
    """Whether a model's folder is stored in bitsandbytes' 4 bits."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    return isinstance(settings, dict) and in_4bit(settings)


def in_4bit(settings: dict[str, Any]) -> bool:
    """Whether a quantization_config is bitsandbytes' 4-bit one."""
    return settings.get("quant_method") == "bitsandbytes" and settings.get("load_in_4bit") is True


def in_16bit(folder: Path, target: Path) -> Path:
    """The folder of a model with 16-bit weights: the given one, or for a 4-bit one what its weights unpack to.

    Args:
        folder: a base.
        target: where that is written; what lies there is replaced.
    """
    if not is_4bit(folder):
        return folder
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        written = path.suffix == ".safetensors" or path.name in ("config.json", "model.safetensors.index.json")
        if path.is_file() and not written:
            (target / path.name).symlink_to(path.resolve())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _unpack(folder, target)
    return target


def _unpack(folder: Path, target: Path) -> None:
    """Write the weights unpacked, tensor by tensor, in files of the same names."""
    from pipeline.model.weights_file import read_weights
    from pipeline.model.weights_writer import TensorPlan, WeightsWriter

    weights = read_weights(folder)
    packed = Packed(weights)
    plans = {
        name: TensorPlan(weights.file_of[name].name, packed.type(name), shape) for name, shape in packed.shapes.items()
    }
    with WeightsWriter(target, plans) as writer:
        for name in plans:
            writer.write(name, 0, packed[name])


class Packed:
    """The tensors of a base in 4 bits as they are unpacked: `packed[name]` is one, whole, in the type that it had.

    Args:
        weights: the base's, of `read_weights`.

    Attributes:
        parts: of each packed tensor what stands beside it: part -> name.
        shapes: of all tensors, as they were before.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.parts: dict[str, dict[str, str]] = {}
        for name in weights.shapes:
            if match := PART.match(name):
                self.parts.setdefault(match[1], {})[match[2]] = name
        self._states = {name: self._state(name) for name in self.parts}
        self.shapes = {
            name: tuple(self._states[name]["shape"]) if name in self._states else shape
            for name, shape in weights.shapes.items()
            if not PART.match(name)
        }

    @property
    def own_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's own tensors."""
        return {name: self.shapes[name] for name in self._weights.own if name in self.shapes}

    def type(self, name: str) -> str:
        """The type that a tensor had, as safetensors names it."""
        from pipeline.model.weights_file import STORED_TYPES

        stored = {torch_name: kind for kind, (torch_name, _) in STORED_TYPES.items()}
        return stored[str(self._states[name]["dtype"])] if name in self._states else self._weights.types[name]

    def __getitem__(self, name: str) -> Any:
        if name not in self.parts:
            return self._weights[name]
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {part: self._weights[of] for part, of in self.parts[name].items()}
        return dequantize_4bit(self._weights[name], QuantState.from_dict(parts, torch.device("cpu")))

    def _state(self, name: str) -> dict[str, Any]:
        """What a packed weight's file says of it: "shape" and "dtype", which it had before."""
        packed = next(of for part, of in self.parts[name].items() if part.startswith("quant_state."))
        state: dict[str, Any] = json.loads(bytes(self._weights[packed].tolist()))
        return state

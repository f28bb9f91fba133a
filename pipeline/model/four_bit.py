"""A base that bitsandbytes has stored in 4 bits, and the 16-bit weights that an adapter on it was trained with.

Beside a packed weight its file holds what unpacks it: scales, the code, and their types. Only training reads such a
folder as it is; everything else is given its weights unpacked, tensor by tensor.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

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
    from pipeline.model.weights_file import STORED_TYPES, read_weights
    from pipeline.model.weights_writer import TensorPlan, WeightsWriter

    weights = read_weights(folder)
    parts: dict[str, dict[str, str]] = {}
    for name in weights.shapes:
        if match := PART.match(name):
            parts.setdefault(match[1], {})[match[2]] = name
    states = {name: _state(weights, found) for name, found in parts.items()}
    stored = {torch_name: kind for kind, (torch_name, _) in STORED_TYPES.items()}
    plans = {}
    for name in weights.shapes:
        if name in states:
            kind = stored[str(states[name]["dtype"])]
            plans[name] = TensorPlan(weights.file_of[name].name, kind, tuple(states[name]["shape"]))
        elif not PART.match(name):
            plans[name] = TensorPlan(weights.file_of[name].name, weights.types[name], weights.shapes[name])
    with WeightsWriter(target, plans) as writer:
        for name in plans:
            writer.write(name, 0, _unpacked(weights, name, parts[name]) if name in parts else weights[name])


def _state(weights: Any, parts: dict[str, str]) -> dict[str, Any]:
    """What a packed weight's file says of it: "shape" and "dtype", which it had before."""
    packed = next(name for part, name in parts.items() if part.startswith("quant_state."))
    state: dict[str, Any] = json.loads(bytes(weights[packed].tolist()))
    return state


def _unpacked(weights: Any, name: str, parts: dict[str, str]) -> Any:
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState.from_dict({part: weights[of] for part, of in parts.items()}, torch.device("cpu"))
    return dequantize_4bit(weights[name], state)

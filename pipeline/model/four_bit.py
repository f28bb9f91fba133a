"""A base that bitsandbytes has stored in 4 bits, and the 16-bit weights that an adapter on it was trained with.

Beside a packed weight its file holds what unpacks it: scales, the code, and their types. Only training reads such a
folder as it is; everything else is given its weights unpacked, tensor by tensor, shard by shard.
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
    places: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            places |= dict.fromkeys(_unpack(path, target / path.name), path.name)
        elif path.is_file() and path.name not in ("config.json", "model.safetensors.index.json"):
            (target / path.name).symlink_to(path.resolve())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(set(places.values())) > 1:
        index = {"metadata": {}, "weight_map": places}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return target


def _unpack(path: Path, target: Path) -> list[str]:
    """Write a shard with its weights unpacked; return the names in it."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    with safe_open(path, framework="pt") as file:
        parts: dict[str, dict[str, Any]] = {}
        for name in file.keys():  # noqa: SIM118  (the file is no mapping)
            if match := PART.match(name):
                parts.setdefault(match[1], {})[match[2]] = file.get_tensor(name)
        for name in file.keys():  # noqa: SIM118
            if PART.match(name):
                continue
            tensors[name] = file.get_tensor(name)
            if name in parts:
                state = QuantState.from_dict(parts[name], torch.device("cpu"))
                tensors[name] = dequantize_4bit(tensors[name], state).contiguous()
    save_file(tensors, target, metadata={"format": "pt"})
    return list(tensors)

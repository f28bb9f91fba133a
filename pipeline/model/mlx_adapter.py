"""An adapter of MLX written as PEFT has them: the same two matrices for each module, transposed and by other names.

MLX adds scale x (x A) B to what a module gives, with A (in, rank) and B (rank, out). PEFT adds alpha / rank x B' A' x,
with A' (rank, in) and B' (out, rank). So A' and B' are A and B transposed, and alpha is scale x rank.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.adapter_folder import CONFIG, OF_MLX, WEIGHTS
from pipeline.model.weights_file import read_weights

_FUSE = "merge it there (`mlx_lm.fuse`, which can dequantize too), and convert what comes of it"


def is_of_mlx(folder: Path) -> bool:
    """Whether a folder holds an adapter of MLX, and none of PEFT."""
    return (folder / CONFIG).is_file() and (folder / OF_MLX).is_file() and not (folder / WEIGHTS).is_file()


def write_as_peft(folder: Path, target: Path) -> None:
    """Write an adapter of MLX as one of PEFT.

    Args:
        folder: as mlx_lm saves it: adapter_config.json and adapters.safetensors.
        target: a folder, in which an adapter is replaced.

    Raises:
        UserError: it is not LoRA on linear modules, or not understood.
    """
    from safetensors.torch import save_file

    weights = read_weights(folder, [folder / OF_MLX])
    rank, scale = _scaling(folder)
    tensors: dict[str, Any] = {}
    for name, shape in weights.shapes.items():
        named = re.fullmatch(r"(.+)\.lora_([ab])", name)
        if named is None or len(shape) != 2:
            raise UserError(f"{folder}: {name} {shape} is no matrix of LoRA on a linear module: {_FUSE}")
        tensors[f"base_model.model.{named[1]}.lora_{named[2].upper()}.weight"] = weights[name].T.contiguous()
    settings = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": scale * rank},
        "target_modules": sorted({name.rpartition(".")[0] for name in weights.shapes}),
    }
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    (target / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _scaling(folder: Path) -> tuple[int, float]:
    """The rank and the scale of MLX's adapter_config.json."""
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind, lora = settings.get("fine_tune_type", "lora"), dict(settings["lora_parameters"])
        rank, scale = lora["rank"], lora["scale"]
        numbers = type(rank) is int and rank > 0 and type(scale) in (int, float)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        numbers = False
    if not numbers:
        raise UserError(f"{path}: has no lora_parameters with a rank and a scale, as mlx_lm writes them: {_FUSE}")
    if kind != "lora" or "alpha" in lora:  # once alpha / rank counted too, later it did not
        what = f"fine_tune_type = {kind!r}" if kind != "lora" else "lora_parameters.alpha, of an older mlx_lm"
        raise UserError(f"{path}: {what}: is not converted here: {_FUSE}")
    return rank, float(scale)

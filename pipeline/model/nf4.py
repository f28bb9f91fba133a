"""What NF4 keeps of a weight: the base as an adapter saw it that was trained on 4 bits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RECORD = "four_bit.json"  # beside the adapter: the modules that training had in 4 bits


def dequantized(weight: Any) -> Any:
    """What NF4 with double quantization keeps of a matrix (T. Dettmers et al., 2023, "QLoRA", section 3), float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values, state = quantize_4bit(weight.float().contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(values, state).float()


def write_record(folder: Path, model: Any) -> None:
    """Write down which modules of a model, as Unsloth loaded it, are in 4 bits: routers, towers and heads are not."""
    from bitsandbytes.nn import Linear4bit

    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    (folder / RECORD).write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")


def quantized_modules(folder: Path) -> set[str]:
    """The modules that were in 4 bits in a training, by what it has written down in its folder."""
    return set(json.loads((folder / RECORD).read_text(encoding="utf-8")))


def dequantize_base(model: Any, modules: set[str]) -> dict[str, Any]:
    """Replace the base's weights by what NF4 keeps of them.

    Args:
        model: a PEFT model whose adapter is not merged.
        modules: those that were in 4 bits, with an adapter or without.

    Returns:
        The weights as they were, by the names of their modules, for `restore_base`.
    """
    import torch

    before = {}
    with torch.no_grad():
        for name, module in _named(model).items():
            if name in modules:
                before[name] = _small_copy(module.weight.detach())
                module.weight.copy_(dequantized(module.weight).to(module.weight.dtype))
    return before


def restore_base(model: Any, before: dict[str, Any]) -> None:
    """Undo `dequantize_base`."""
    import torch

    named = _named(model)
    with torch.no_grad():
        for name, weight in before.items():
            named[name].weight.copy_(weight)  # in whatever type it was kept


def _named(model: Any) -> dict[str, Any]:
    """The linear modules of a PEFT model by the names that they have in the base; PEFT's own and its copies apart."""
    from torch.nn import Linear

    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, Linear)
        and not re.search(r"(^|\.)(lora_\w+|modules_to_save|original_module)\.", f"{name}.")
    }


def _small_copy(weight: Any) -> Any:
    """A copy in 16 bits where that loses nothing: the weights of a base that is stored so."""
    import torch

    for kind in (torch.float16, torch.bfloat16):
        copy = weight.to(kind, copy=True)
        if torch.equal(copy.to(weight.dtype), weight):
            return copy
    return weight.clone()

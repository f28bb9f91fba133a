"""What NF4 keeps of a weight: the base as an adapter saw it that was trained on 4 bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def dequantized(weight: Any) -> Any:
    """What NF4 with double quantization keeps of a matrix (T. Dettmers et al., 2023, "QLoRA", section 3), float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values, state = quantize_4bit(weight.float().contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(values, state).float()


def dequantize_base(model: Any) -> dict[str, Any]:
    """Replace the base's weights by what NF4 keeps of them, with an adapter or without: all of them were 4-bit.

    Args:
        model: a PEFT model whose adapter is not merged.

    Returns:
        The weights as they were, by the names of their modules, for `restore_base`.
    """
    import torch

    before = {}
    with torch.no_grad():
        for name, module in _linear(model).items():
            before[name] = _small_copy(module.weight.detach())
            module.weight.copy_(dequantized(module.weight).to(module.weight.dtype))
    return before


def restore_base(model: Any, before: dict[str, Any]) -> None:
    """Undo `dequantize_base`."""
    import torch

    with torch.no_grad():
        for name, module in _linear(model).items():
            module.weight.copy_(before[name])  # in whatever type it was kept


def quantized_modules(folder: Path) -> set[str]:
    """The modules of a base whose weights 4-bit training quantizes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return set(_linear(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))))


def _linear(model: Any) -> dict[str, Any]:
    """The linear modules of a model, PEFT's own and its copies apart; bitsandbytes leaves the head as it is stored."""
    from torch.nn import Linear

    return {
        name.replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, Linear)
        and not re.search(r"(^|\.)(lora_\w+|modules_to_save|original_module)\.", f"{name}.")
        and name.replace(".base_layer", "").rpartition(".")[2] != "lm_head"
    }


def _small_copy(weight: Any) -> Any:
    """A copy in 16 bits where that loses nothing: the weights of a base that is stored so."""
    import torch

    for kind in (torch.float16, torch.bfloat16):
        copy = weight.to(kind, copy=True)
        if torch.equal(copy.to(weight.dtype), weight):
            return copy
    return weight.clone()

"""What NF4 keeps of a weight: the base as an adapter saw it that was trained on 4 bits."""

from __future__ import annotations

from typing import Any


def dequantized(weight: Any) -> Any:
    """What NF4 with double quantization keeps of a matrix (T. Dettmers et al., 2023, "QLoRA", section 3), float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values, state = quantize_4bit(weight.float().contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(values, state).float()


def dequantize_targets(model: Any) -> dict[str, Any]:
    """Replace the base's weights under each adapter by what NF4 keeps of them.

    Args:
        model: a PEFT model whose adapter is not merged.

    Returns:
        The weights as they were, by the names of their modules, for `restore_targets`.
    """
    import torch

    before = {}
    with torch.no_grad():
        for name, module in _targets(model):
            before[name] = _small_copy(module.weight.detach())
            module.weight.copy_(dequantized(module.weight).to(module.weight.dtype))
    return before


def restore_targets(model: Any, before: dict[str, Any]) -> None:
    """Undo `dequantize_targets`."""
    import torch

    with torch.no_grad():
        for name, module in _targets(model):
            module.weight.copy_(before[name])  # in whatever type it was kept


def kept_in_16bit(module: str) -> bool:
    """Whether 4-bit training leaves a linear module as it is stored: bitsandbytes does that with the head."""
    return module.rpartition(".")[2] == "lm_head"


def _targets(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer
    from torch.nn import Linear

    return [
        (name, module.get_base_layer())
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), Linear) and not kept_in_16bit(name)
    ]


def _small_copy(weight: Any) -> Any:
    """A copy in 16 bits where that loses nothing: the weights of a base that is stored so."""
    import torch

    for kind in (torch.float16, torch.bfloat16):
        copy = weight.to(kind, copy=True)
        if torch.equal(copy.to(weight.dtype), weight):
            return copy
    return weight.clone()

"""What NF4 keeps of a weight: the base as an adapter saw it that was trained on 4 bits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = "modules.json"  # beside the adapter: how training had the base's modules


def dequantized(weight: Any, *, transposed: bool = False) -> Any:
    """What NF4 with double quantization keeps of a matrix (T. Dettmers et al., 2023, "QLoRA", section 3), float32.

    Args:
        weight: (out, in), the order in which its values are quantized together; (in, out) where it is transposed.
        transposed: whether it is.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if transposed:
        return dequantized(weight.T).T
    values, state = quantize_4bit(weight.float().contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(values, state).float()


@dataclass(frozen=True)
class Record:
    """How training had the base's modules, by their names.

    Attributes:
        in_4bit: those whose weights were in 4 bits; routers, towers and heads are not.
        transposed: those that keep their weight as (in, out), as GPT-2's do.
    """

    in_4bit: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()

    @staticmethod
    def of(model: Any) -> Record:
        """That of a model as Unsloth loaded it."""
        from bitsandbytes.nn import Linear4bit
        from transformers.pytorch_utils import Conv1D

        modules = dict(model.named_modules())
        return Record(
            frozenset(name for name, module in modules.items() if isinstance(module, Linear4bit)),
            # What stands for another class in 4 bits knows for which.
            frozenset(
                n for n, module in modules.items() if (getattr(module, "source_cls", None) or type(module)) is Conv1D
            ),
        )

    @staticmethod
    def read(folder: Path) -> Record:
        """That of a training's folder."""
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Record(frozenset(found["in_4bit"]), frozenset(found["transposed"]))

    def write(self, folder: Path) -> None:
        """Leave it in a training's folder."""
        text = json.dumps({"in_4bit": sorted(self.in_4bit), "transposed": sorted(self.transposed)}, indent=1)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def dequantize_base(model: Any, record: Record) -> dict[str, Any]:
    """Replace the base's weights by what NF4 keeps of them.

    Args:
        model: a PEFT model whose adapter is not merged.
        record: which of its modules were in 4 bits, with an adapter or without.

    Returns:
        The weights as they were, by the names of their modules, for `restore_base`.
    """
    import torch

    before = {}
    with torch.no_grad():
        for name, module in _named(model).items():
            if name in record.in_4bit:
                before[name] = _small_copy(module.weight.detach())
                kept = dequantized(module.weight, transposed=name in record.transposed)
                module.weight.copy_(kept.to(module.weight.dtype))
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
    from transformers.pytorch_utils import Conv1D

    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, Linear | Conv1D)
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

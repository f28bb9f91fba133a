"""What NF4 keeps of a weight: the base as an adapter saw it that was trained on 4 bits."""

from __future__ import annotations

import json
import math
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.model.adapter_file import Renaming, stored_as
from pipeline.model.weights_file import Weights

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
        in_4bit: those whose weights were in 4 bits, and tensors of experts that were; routers and heads were not.
        transposed: those that keep their weight as (in, out), as GPT-2's do.
    """

    in_4bit: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()

    @staticmethod
    def of(model: Any) -> Record:
        """That of a model as Unsloth loaded it."""
        from bitsandbytes.nn import Params4bit
        from transformers.pytorch_utils import Conv1D

        modules = dict(model.named_modules())
        weights = dict(model.named_parameters())
        return Record(
            # Told by the weights: on a GPU Unsloth packs experts too, which are no modules of bitsandbytes'.
            frozenset(name.removesuffix(".weight") for name, of in weights.items() if isinstance(of, Params4bit)),
            # What stands for another class in 4 bits knows for which.
            frozenset(
                n for n, module in modules.items() if (getattr(module, "source_cls", None) or type(module)) is Conv1D
            ),
        )

    @property
    def experts(self) -> list[str]:
        """Of what was in 4 bits, the tensors that hold all of a layer's experts, and are no module's."""
        return [name for name in self.in_4bit if re.search(r"\bexperts\.\w+$", name)]

    @staticmethod
    def read(folder: Path) -> Record:
        """That of a training's folder."""
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Record(frozenset(found["in_4bit"]), frozenset(found["transposed"]))

    def write(self, folder: Path) -> None:
        """Leave it in a training's folder."""
        text = json.dumps({"in_4bit": sorted(self.in_4bit), "transposed": sorted(self.transposed)}, indent=1)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")


class Kept:
    """What NF4 keeps of a base: `kept[name]` is a tensor of its files that was in 4 bits, in float32, for any thread.

    What was packed as one is unpacked as one: the scales of all its blocks are quantized around their mean.

    Args:
        base: the files, in 16 or 32 bits.
        record: how training had the modules.
        names: how the loaded model's names begin in the files.
    """

    def __init__(self, base: Weights, record: Record, names: Renaming) -> None:
        self._base = base
        packed = [stored_as(f"{of}.weight", base, names) or stored_as(of, base, names) for of in record.in_4bit]
        self._packed = {name: together for together in packed for name in together}
        self._transposed = {f"{names.to_file(module)}.weight" for module in record.transposed}
        self._experts: dict[tuple[str, ...], dict[str, Any]] = {}  # of the layer at hand: all are asked for in turn
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._packed

    def __getitem__(self, name: str) -> Any:
        together = self._packed[name]
        if len(together) == 1:
            return dequantized(self._base[name], transposed=name in self._transposed)
        with self._lock:
            if together not in self._experts:
                if len(self._experts) > 1:
                    del self._experts[next(iter(self._experts))]
                self._experts[together] = self._unpacked(together)
            return self._experts[together][name]

    def _unpacked(self, together: tuple[str, ...]) -> dict[str, Any]:
        import torch

        shapes = [self._base.shapes[name] for name in together]
        sizes = [math.prod(shape) for shape in shapes]
        joined = torch.empty(sum(sizes))
        for name, place in zip(together, joined.split(sizes), strict=True):
            place.copy_(self._base[name].reshape(-1))
        parts = dequantized(joined).reshape(-1).split(sizes)
        return {name: part.reshape(shape) for name, part, shape in zip(together, parts, shapes, strict=True)}


def dequantize_base(model: Any, record: Record, keep: dict[str, Any] | None = None) -> None:
    """Replace the base's weights by what NF4 keeps of them.

    Args:
        model: of transformers, or a PEFT model whose adapter is not merged.
        record: which of its weights were in 4 bits, with an adapter or without.
        keep: gets the weights as they were, by their names, for `restore_base`.
    """
    import torch

    with torch.no_grad():
        for name, weight in _weights(model).items():
            if name in record.in_4bit:
                if keep is not None:
                    keep[name] = _small_copy(weight.detach())
                weight.copy_(dequantized(weight, transposed=name in record.transposed))


def restore_base(model: Any, before: dict[str, Any]) -> None:
    """Undo `dequantize_base`."""
    import torch

    weights = _weights(model)
    with torch.no_grad():
        for name, weight in before.items():
            weights[name].copy_(weight)  # in whatever type it was kept


def _weights(model: Any) -> dict[str, Any]:
    """The base's weights by the names that a record has; PEFT's own and its copies are none."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model.").removesuffix(".weight"): weight
        for name, weight in model.named_parameters()
        if not re.search(r"(^|\.)(lora_\w+|modules_to_save|original_module)\.", name)
    }


def _small_copy(weight: Any) -> Any:
    """A copy in 16 bits where that loses nothing: the weights of a base that is stored so."""
    import torch

    for kind in (torch.float16, torch.bfloat16):
        copy = weight.to(kind, copy=True)
        if torch.equal(copy.to(weight.dtype), weight):
            return copy
    return weight.clone()

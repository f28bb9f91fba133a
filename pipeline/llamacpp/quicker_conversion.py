"""What is changed in the process that llama.cpp's converter runs in, so that it takes less time and less memory.

The converter widens a matrix of bfloat16 to float32, 2 GB for the embedding of a large vocabulary, and then rounds it
to bfloat16 again. Here it is taken a few rows at a time, by the converter's own LazyChunkedTensor, and where bfloat16
is written it is copied. What is written is the same to the byte.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import numpy as np

_MODULE = "conversion.base"
AT_ONCE = 2**20  # numbers: they stay in the processor's cache
_MAGNITUDE, _INFINITY = 0x7FFF, 0x7F80  # of a bfloat16's bits: all but the sign; above this they are no number
Array = np.ndarray[Any, np.dtype[Any]]


def quicken() -> None:
    """Change the converter that this process will import."""
    sys.meta_path.insert(0, _Finder())


def take_in_rows(base: ModuleType) -> None:
    """Change the converter's module, by which a tensor that is yet to be computed becomes one of numpy."""
    lazy, gguf, theirs = base.LazyTorchTensor, base.gguf, base.LazyTorchTensor.numpy

    class InRows(gguf.LazyChunkedTensor):  # type: ignore[name-defined]
        def __init__(self, stored: Any) -> None:
            count = max(1, AT_ONCE // math.prod(stored.shape[1:]))
            self._stored = [partial(_rows, stored, first, count) for first in range(0, stored.shape[0], count)]
            super().__init__([partial(_widened, rows) for rows in self._stored], tuple(stored.shape), np.float32)

        def quantize(self, kind: Any) -> Any:
            as_theirs = super().quantize(kind)
            if kind != gguf.GGMLQuantizationType.BF16:
                return as_theirs
            as_stored = [partial(_bytes, rows, partial(gguf.quants.quantize, qtype=kind)) for rows in self._stored]
            return gguf.LazyChunkedTensor(as_stored, as_theirs.shape, as_theirs.dtype)

    def numpy(tensor: Any) -> Any:
        stored = _only_widened(tensor, lazy)
        return theirs(tensor) if stored is None else InRows(stored)

    lazy.numpy = numpy


def _only_widened(tensor: Any, lazy: type[Any]) -> Any:
    """The matrix of bfloat16 that a tensor is but for its type; None where it is computed otherwise."""
    import torch

    if len(tensor.shape) < 2 or len(tensor._args) != 2 or tensor._args[1] is not torch.float32:
        return None
    stored = tensor._args[0]
    same = isinstance(stored, lazy) and stored.dtype == torch.bfloat16 and stored.shape == tensor.shape
    return stored if same else None


def _rows(stored: Any, first: int, count: int) -> Any:
    return type(stored).to_eager(stored)[first : first + count]


def _widened(rows: Callable[[], Any]) -> Array:
    widened: Array = rows().float().numpy()
    return widened


def _bytes(rows: Callable[[], Any], rounded: Callable[[Array], Array]) -> Array:
    """Rows as they are stored; where one of them is no number, as the converter rounds them, which changes its bits."""
    import torch

    bits: Array = rows().contiguous().view(torch.uint16).numpy()
    return rounded(_widened(rows)) if ((bits & _MAGNITUDE) > _INFINITY).any() else bits.view(np.uint8)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _MODULE else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, theirs: Loader) -> None:
        self._theirs = theirs

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._theirs.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._theirs.exec_module(module)
        take_in_rows(module)

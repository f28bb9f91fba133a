"""gguf-py's rounding to bfloat16 in fewer passes: what a converter spends most of its time on.

The bits are the same: gguf-py widens every number to 64 bits first and looks for NaN in all of them; here that is left
to it where there is a NaN.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import numpy as np

_MODULE = "gguf.quants"
Blocks = np.ndarray[Any, np.dtype[Any]]


def rounding(theirs: Callable[[Blocks], Blocks]) -> Callable[[type, Blocks], Blocks]:
    """What takes the place of `BF16.quantize_blocks`, whose own is asked where there is a NaN.

    It is given float32 and returns the bytes of bfloat16, rounded to the nearest, ties to even.
    """

    def quantize_blocks(_: type, blocks: Blocks) -> Blocks:
        if np.isnan(blocks).any():
            return theirs(blocks)
        bits = blocks.view(np.uint32)
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += bits
        rounded += np.uint32(0x7FFF)
        rounded >>= np.uint32(16)
        return rounded.astype(np.uint16).view(np.uint8)

    return quantize_blocks


def quicken() -> None:
    """Have the gguf-py that this process imports round so, whichever it is."""
    sys.meta_path.insert(0, _Finder())


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
        module.BF16.quantize_blocks = classmethod(rounding(module.BF16.quantize_blocks))

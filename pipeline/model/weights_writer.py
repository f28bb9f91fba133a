"""safetensors files that are written tensor by tensor, piece by piece, by several threads; none is in memory whole.

The library's own writer wants all tensors of a file at once. What is written here is byte for byte what it would write:
a header with every tensor's name, type, shape and place, sorted by type and name, and then the numbers.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.model.weights_file import INDEX, STORED_TYPES, WHOLE

_ORDER = list(STORED_TYPES)  # the larger types come first, so that every tensor is aligned


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is to be written: its file's name, its type as safetensors names it, and its shape."""

    file: str
    type: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return STORED_TYPES[self.type][1] * math.prod(self.shape)


class WeightsWriter:
    """Writes a folder's weights. A context: on leaving it the files are closed, and the index is there if it is needed.

    Args:
        folder: where the files are written.
        tensors: by name. One file is called model.safetensors, whatever is planned: nothing else finds it.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorPlan]) -> None:
        self._plans = dict(tensors)
        files = sorted({plan.file for plan in tensors.values()})
        self._named = {file: WHOLE if len(files) == 1 else file for file in files}
        self._folder = folder
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(plan.bytes for plan in self._plans.values())

    def __enter__(self) -> WeightsWriter:
        for file, name in self._named.items():
            self._begin(self._folder / name, {key: plan for key, plan in self._plans.items() if plan.file == file})
        return self

    def _begin(self, path: Path, plans: Mapping[str, TensorPlan]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        ends: dict[str, int] = {}
        at = 0
        for name in sorted(plans, key=lambda name: (-_ORDER.index(plans[name].type), name)):
            plan = plans[name]
            ends[name] = at
            header[name] = {"dtype": plan.type, "shape": list(plan.shape), "data_offsets": [at, at + plan.bytes]}
            at += plan.bytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._descriptors.append(descriptor)
        _write(descriptor, struct.pack("<Q", len(text)) + text, 0)
        os.ftruncate(descriptor, 8 + len(text) + at)
        self._places |= {name: (descriptor, 8 + len(text) + start) for name, start in ends.items()}

    def write(self, name: str, row: int, tensor: Any) -> None:
        """Write rows of a tensor; any thread may.

        Args:
            name: the tensor's.
            row: the first of its rows that is given.
            tensor: torch's, of the planned type.
        """
        import torch

        plan = self._plans[name]
        descriptor, at = self._places[name]
        size = plan.bytes // plan.shape[0] if plan.shape else 0
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        _write(descriptor, memoryview(data), at + row * size)

    def __exit__(self, kind: object, *error: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        if kind is None and len(self._named) > 1:
            index = {
                "metadata": {
                    "total_parameters": sum(math.prod(plan.shape) for plan in self._plans.values()),
                    "total_size": self.bytes,
                },
                "weight_map": {name: self._named[plan.file] for name, plan in self._plans.items()},
            }
            text = json.dumps(index, indent=2, sort_keys=True)
            (self._folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _write(descriptor: int, data: bytes | memoryview, at: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(descriptor, left, at)
        left, at = left[done:], at + done

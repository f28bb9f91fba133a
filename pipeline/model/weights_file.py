"""The weights of a Hugging Face folder: which files hold them, and every tensor's name, shape and type.

All of it stands in the files' headers. The numbers of a tensor are read when they are asked for, one tensor at a time,
so that a folder of any size fits into the memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.config_file import text_config
from pipeline.model.four_bit import PART

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Values that a model computes from its configuration; old files carry them.
BUFFERS = ("rotary_emb.inv_freq", "masked_bias")
# torch's names of the types that safetensors names, and the bytes of a number.
STORED_TYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "I16": ("int16", 2), "F16": ("float16", 2),
    "BF16": ("bfloat16", 2), "I32": ("int32", 4), "F32": ("float32", 4), "F64": ("float64", 8), "I64": ("int64", 8),
}  # fmt: skip


def torch_type(kind: str) -> Any:
    """torch's type of one that safetensors names, e.g. "BF16"."""
    import torch

    return getattr(torch, STORED_TYPES[kind][0])


def weight_files(folder: Path) -> list[Path]:
    """The files that make up a model, as transformers chooses them: some folders hold the weights a second time.

    Args:
        folder: a model's, or an adapter's, whose one file has another name.

    Returns:
        model.safetensors; else the shards of the index; else every *.safetensors. Empty where there is none.

    Raises:
        UserError: the index cannot be read, or a shard that it names is missing.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder}: {INDEX} cannot be read: {error}") from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder}: {missing[0]} is missing ({len(missing)} of {len(names)} shards)")
    return [folder / name for name in names]


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder. `weights[name]` reads one, as a torch tensor of its stored type.

    Attributes:
        folder: where they are.
        files: the files that hold them.
        shapes: of every tensor, by name.
        types: of every tensor, as safetensors names them, e.g. "BF16".
        file_of: which file holds a tensor.
    """

    folder: Path
    files: list[Path]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    file_of: dict[str, Path] = field(default_factory=dict, repr=False)
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)
    _raw: list[Any] = field(default_factory=list, repr=False)

    def rows(self, name: str, start: int, stop: int) -> Any:
        """Read rows of a tensor into memory, as a torch tensor of its stored type; any thread may.

        Args:
            name: the tensor's.
            start, stop: which rows of its first axis; a number on its own counts as one row.
        """
        import numpy as np
        import torch

        width = STORED_TYPES[self.types[name]][1]
        inner = self.shapes[name][1:]
        row = width * math.prod(inner)
        data = np.empty((stop - start) * row, np.uint8)
        descriptor, at = self._places[name]
        left = memoryview(data.data)
        at += start * row
        while left:
            got = os.preadv(descriptor, [left], at)
            if not got:
                raise UserError(f"{self.file_of[name]}: is cut short: copy it again")
            left, at = left[got:], at + got
        return torch.from_numpy(data).view(torch_type(self.types[name])).reshape(stop - start, *inner)

    def pieces(self, name: str, numbers: int = 1 << 18) -> Iterator[tuple[int, Any]]:
        """A tensor some rows at a time, with the number of the first; about so many numbers each."""
        shape = self.shapes[name]
        count = shape[0] if shape else 1
        step = max(1, numbers // max(1, math.prod(shape[1:])))
        for row in range(0, count, step):
            yield row, self.rows(name, row, min(count, row + step))

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Of every tensor: its file, opened, and where in it the numbers begin (safetensors' format, one page)."""
        places = {}
        for path in self.files:
            file = path.open("rb")
            self._raw.append(file)  # open as long as this lives
            (length,) = struct.unpack("<Q", file.read(8))
            for name, entry in json.loads(file.read(length)).items():
                if name != "__metadata__":
                    places[name] = file.fileno(), 8 + length + entry["data_offsets"][0]
        return places

    def __getitem__(self, name: str) -> Any:
        from safetensors import safe_open

        path = self.file_of[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_tensor(name)

    def place(self, name: str) -> tuple[int, int]:
        """What sorts tensors in the order in which they lie in the files."""
        return self._places[name]

    @cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def stored_values(self) -> int:
        """How many numbers the files hold, as the hub counts them."""
        return sum(self._values(name) for name in self.shapes)

    def _values(self, name: str) -> int:
        """How many numbers of the model a tensor holds."""
        if PART.match(name):  # it unpacks another
            return 0
        packed = 2 if self.types[name] == "U8" else 1  # bitsandbytes packs two values of 4 bits into a byte
        return packed * math.prod(self.shapes[name])

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(text_config(self.folder).get("tie_word_embeddings", False))

    @property
    def own(self) -> list[str]:
        """The tensors that are the model's own: no buffers, and no head beside the embedding that it is tied to."""
        left_out = (*BUFFERS, "lm_head.weight") if self.tied else BUFFERS
        return [name for name in self.shapes if not name.endswith(left_out)]

    @property
    def own_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of these."""
        return {name: self.shapes[name] for name in self.own}

    @property
    def parameters(self) -> int:
        """How many numbers the model has of its own: a tied head that is stored too counts once, buffers do not."""
        return sum(self._values(name) for name in self.own)

    @property
    def main_type(self) -> str:
        """The type of most numbers, as safetensors names it."""
        counts: Counter[str] = Counter()
        for name, kind in self.types.items():
            counts[kind] += math.prod(self.shapes[name])
        return counts.most_common(1)[0][0]


def read_weights(folder: Path, files: list[Path] | None = None) -> Weights:
    """Read the headers of a folder's weights.

    Args:
        folder: a model's or an adapter's.
        files: those that are meant, where it may hold others; without them, those of `weight_files`.

    Raises:
        UserError: there are none, a shard is missing, or a file is cut short.
    """
    from safetensors import SafetensorError, safe_open

    weights = Weights(folder, weight_files(folder) if files is None else files)
    for path in weights.files:
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  (the file is no mapping)
                    header = file.get_slice(name)
                    weights.shapes[name] = tuple(header.get_shape())
                    weights.types[name] = header.get_dtype()
                    weights.file_of[name] = path
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder}: {path.name} is cut short or damaged ({error}): copy it again") from None
    if not weights.shapes:
        raise UserError(f"{folder}: has no weights (*.safetensors)")
    return weights

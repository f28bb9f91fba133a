"""A GGUF file, opened and believed only after a look: its metadata, its tensors, and whether they can be right.

Converter, quantizer and copy programs exit 0 on files that do not work. What is checked here is what such files
showed: cut short, keys missing, NaN, tensors of nothing but zeros, a vocabulary without merges.

The format is read directly (it is one page: ggml/docs/gguf.md): an array of 150,000 merges takes a tenth of a second,
and a file that ends too early can be told from one that is wrong.
"""

import math
import mmap
import struct
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.ggml import TensorType, all_finite, dequantize, tensor_type
from pipeline.processes import cores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Value types of the format, by number: struct's code for each number type.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")

REQUIRED_KEYS = (
    "general.architecture",
    "general.file_type",
    "{architecture}.block_count",
    "{architecture}.context_length",
    "{architecture}.embedding_length",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
)
# Tokenizer models that split with merges: without them every text becomes single bytes.
_NEED_MERGES = ("gpt2",)
# Bytes of a tensor that are looked at at once.
_PIECE = 64 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` as llama.cpp writes it, the row's length first; `type` e.g. "q4_K"; size in bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    offset: int = field(repr=False)
    storage: TensorType = field(repr=False)

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFInfo:
    """What a GGUF file says of itself. Sizes in bytes.

    Attributes:
        path: the file.
        metadata: every key; arrays as lists.
        tensors: in the file's order.
        size: the file's size.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    size: int

    @property
    def architecture(self) -> str:
        """The family, e.g. "llama"."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def parameter_count(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a number takes on average, all tensors together."""
        return 8 * self.tensor_bytes / max(1, self.parameter_count)

    @property
    def tensor_types(self) -> dict[str, int]:
        """How many tensors are stored in each type."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())

    @property
    def parameters_by_type(self) -> dict[str, int]:
        """How many parameters are stored in each type."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.type] += tensor.elements
        return dict(counts.most_common())

    @cached_property
    def names(self) -> dict[str, TensorInfo]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def implied(self) -> dict[str, int]:
        """The widths of a head that the metadata does not name, as llama.cpp takes them: an equal part of the row.

        Example: 576 numbers and 9 heads give attention.key_length and attention.value_length of 64.
        """
        names = (f"{self.architecture}.{name}" for name in ("embedding_length", "attention.head_count"))
        width, heads = (self.metadata.get(name) for name in names)
        if not isinstance(width, int) or not isinstance(heads, int) or not heads:  # some architectures have none
            return {}
        keys = (f"{self.architecture}.attention.{name}_length" for name in ("key", "value"))
        return {key: width // heads for key in keys if key not in self.metadata}

    def data(self, tensor: TensorInfo) -> "NDArray[np.uint8]":
        """A tensor's bytes, mapped from the file."""
        import numpy as np

        return np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.bytes,))

    def values(self, tensor: TensorInfo) -> "NDArray[np.float32]":
        """A tensor's numbers, dequantized; in C order, so that the last axis is the row."""
        return dequantize(tensor.storage, self.data(tensor)).reshape(tensor.shape[::-1])

    def pieces(self, tensor: TensorInfo) -> "Iterator[NDArray[np.float32]]":
        """A tensor's numbers, dequantized, some rows at a time: equally many in every file that has the tensor."""
        data = self.data(tensor)
        rows = tensor.elements // tensor.shape[0]
        row = tensor.bytes // rows
        together = max(1, _PIECE // (4 * tensor.shape[0]))
        for start in range(0, rows, together):
            yield dequantize(tensor.storage, data[start * row : (start + together) * row])


def inspect(path: Path) -> GGUFInfo:
    """Read a file's header.

    Raises:
        UserError: no such file.
        PipelineError: it is no GGUF file, or is cut short.
    """
    try:
        state = path.stat()
        # Within a tick of the file system's clock a file may be written again and have the same time.
        settled = time.time_ns() - state.st_mtime_ns > 1_000_000_000
        read = _read if settled else _read.__wrapped__
        info = read(path, state.st_size, (state.st_dev, state.st_ino, state.st_mtime_ns))
        return replace(info, metadata=dict(info.metadata))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a GGUF file") from None
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error}") from error


@lru_cache(maxsize=4)  # every check asks, and a vocabulary takes a while
def _read(path: Path, size: int, state: tuple[int, ...]) -> GGUFInfo:
    """Read a file's header; `state` is another where its content may be."""
    if path.is_file() and size < 24:
        raise PipelineError(f"{path}: is cut short: {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(path, data, size)


def _parse(path: Path, data: mmap.mmap, size: int) -> GGUFInfo:
    magic, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF":
        raise PipelineError(f"{path}: is not a GGUF file")
    if version not in (2, 3):
        raise PipelineError(f"{path}: is GGUF version {version}, which is not supported (2 and 3 are)")
    header = _Header(data, 24)
    try:
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = header.string()
            if key in metadata:
                raise PipelineError(f"{path}: holds the key {key} twice")
            metadata[key] = header.value()
        rows = [header.tensor() for _ in range(tensor_count)]
    except (struct.error, IndexError, MemoryError, OverflowError) as error:
        raise PipelineError(f"{path}: is cut short or damaged: its header ends early") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: is damaged at byte {header.at:,}: {error}") from error

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise PipelineError(f"{path}: general.alignment is {alignment}")
    start = -(-header.at // alignment) * alignment
    tensors = []
    for name, shape, type_id, offset in rows:
        storage = tensor_type(type_id)
        if storage is None:
            raise PipelineError(f"{path}: {name} has the type number {type_id}, which this llama.cpp does not know")
        if not shape or shape[0] % storage.block:
            raise PipelineError(f"{path}: {name} has the shape {shape}, which {storage.name} cannot store")
        size_stored = storage.size(math.prod(shape))
        tensors.append(TensorInfo(name, shape, storage.name, size_stored, start + offset, storage))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise PipelineError(f"{path}: holds a tensor twice")
    end = max((tensor.offset + tensor.bytes for tensor in tensors), default=header.at)
    if size < end:
        raise PipelineError(f"{path}: is cut short: {size:,} of {end:,} bytes")
    return GGUFInfo(path, metadata, tensors, size)


class _Header:
    """Reads the header's values one after the other."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        (text,) = self.strings(1)
        return text

    def strings(self, count: int) -> list[str]:
        """Many strings, as a vocabulary has: a call for each would take seconds."""
        data, at, found = self.data, self.at, []
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, at)
            text = data[at + 8 : at + 8 + length]
            if len(text) != length:
                raise IndexError
            found.append(str(text, "utf-8"))
            at += 8 + length
        self.at = at
        return found

    def value(self) -> Any:
        return self._value(self.number("I"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, length = self.number("I"), self.number("Q")
            if code := _NUMBERS.get(kind):
                if length > len(self.data):
                    raise IndexError
                values = struct.unpack_from(f"<{length}{code}", self.data, self.at)
                self.at += struct.calcsize(f"<{length}{code}")
                return list(values)
            if kind == _STRING:
                return self.strings(length)
            return [self._value(kind) for _ in range(length)]
        if kind not in _NUMBERS:
            raise ValueError(f"a value of the unknown type {kind}")
        return self.number(_NUMBERS[kind])

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        dimensions = self.number("I")
        if dimensions > 8:
            raise ValueError(f"{name} with {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return name, shape, self.number("I"), self.number("Q")


def check(path: Path) -> GGUFInfo:
    """Read a file whole and refuse one that cannot work.

    Returns:
        What it holds.

    Raises:
        UserError: no such file.
        PipelineError: what is wrong with it; every complaint, a line each.
    """
    info = inspect(path)
    complaints = [*_missing(info), *_bad_vocabulary(info), *_bad_values(info)]
    if complaints:
        more = f"\n  and {len(complaints) - 10} more" if len(complaints) > 10 else ""
        raise PipelineError(f"{path}: is broken:\n  " + "\n  ".join(complaints[:10]) + more)
    return info


def _missing(info: GGUFInfo) -> Iterator[str]:
    for key in REQUIRED_KEYS:
        if (key := key.format(architecture=info.architecture)) not in info.metadata:
            yield f"the key {key} is missing"
    if "token_embd.weight" not in info.names:
        yield "the tensor token_embd.weight is missing"
    blocks = info.metadata.get(f"{info.architecture}.block_count", 0)
    found = {int(name.split(".")[1]) for name in info.names if name.startswith("blk.")}
    if absent := sorted(set(range(blocks)) - found):
        yield f"of {blocks} blocks {len(absent)} are missing, the first is blk.{absent[0]}"


def _bad_vocabulary(info: GGUFInfo) -> Iterator[str]:
    tokens = info.metadata.get("tokenizer.ggml.tokens", [])
    model = info.metadata.get("tokenizer.ggml.model")
    types = info.metadata.get("tokenizer.ggml.token_type")
    if types is not None and len(types) != len(tokens):
        yield f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens"
    if model in _NEED_MERGES:
        if not info.metadata.get("tokenizer.ggml.merges"):
            yield f"tokenizer.ggml.merges is missing, and the tokenizer ({model}) needs them"
        if info.metadata.get("tokenizer.ggml.pre") in (None, "", "default"):
            yield "tokenizer.ggml.pre is not set: llama.cpp would guess how text is split before the merges"
    for name in ("bos", "eos", "eot", "unknown", "padding"):
        id = info.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if id is not None and not 0 <= id < len(tokens):
            yield f"tokenizer.ggml.{name}_token_id is {id}, beyond the vocabulary of {len(tokens)}"
    embedding = info.names.get("token_embd.weight")
    if embedding is not None and tokens and embedding.shape[-1] != len(tokens):
        yield f"token_embd.weight has {embedding.shape[-1]} rows for {len(tokens)} tokens"
    head = info.names.get("output.weight")
    if head is not None and embedding is not None and head.shape != embedding.shape:
        yield f"output.weight has the shape {head.shape}, the embedding {embedding.shape}"


def _bad_values(info: GGUFInfo) -> Iterator[str]:
    with ThreadPoolExecutor(cores()) as pool:  # the library computes without Python's lock
        yield from filter(None, pool.map(lambda tensor: _bad_value(info, tensor), info.tensors))


def _bad_value(info: GGUFInfo, tensor: TensorInfo) -> str:
    data = info.data(tensor)
    step = max(1, _PIECE // tensor.storage.bytes) * tensor.storage.bytes
    zero = True
    for start in range(0, tensor.bytes, step):
        piece = data[start : start + step]
        if not all_finite(tensor.storage, piece):
            return f"{tensor.name} holds NaN or infinity"
        zero = zero and _is_zero(tensor, piece)
    # A bias begins at zero, and may have stayed there.
    return f"{tensor.name} holds nothing but zeros" if zero and not tensor.name.endswith(".bias") else ""


def _is_zero(tensor: TensorInfo, data: "NDArray[np.uint8]") -> bool:
    """Nothing but zeros; nearly always known after the first few blocks."""
    few = 256 * tensor.storage.bytes
    return not dequantize(tensor.storage, data[:few]).any() and not dequantize(tensor.storage, data[few:]).any()

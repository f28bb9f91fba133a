"""The types of tensors, as the pinned libggml knows them: sizes, whether bytes are valid, and their values as float32.

Asking the library itself leaves no second table of block formats that could disagree with the programs.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.llamacpp.programs import programs_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# GGML_TYPE_COUNT of the pin: the library reads beyond its table when it is asked for more.
_TYPE_COUNT = 43
_LIBRARIES = ("ggml-base", "ggml-cpu", "ggml", "llama")


@dataclass(frozen=True)
class TensorType:
    """A way of storing numbers.

    Attributes:
        id: its number in a GGUF file.
        name: e.g. "q4_K" or "f16".
        block: how many numbers are stored together; a row is a multiple of it.
        bytes: size of a block.
        quantized: whether it is one of the quantized types.
    """

    id: int
    name: str
    block: int
    bytes: int
    quantized: bool

    def size(self, elements: int) -> int:
        """Bytes of that many elements, whole blocks."""
        return elements // self.block * self.bytes


class _Traits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def shared_library(name: str) -> ctypes.CDLL:
    """One of the build's shared libraries ("ggml-base" or "llama"), with what it needs loaded before it.

    They are opened by their full paths: a search could find another version's.
    """
    needed = _LIBRARIES[: _LIBRARIES.index(name) + 1]
    loaded = [ctypes.CDLL(str(_library_file(part)), mode=ctypes.RTLD_GLOBAL) for part in needed]
    return loaded[-1]


def _library_file(name: str) -> Path:
    folder = programs_folder()
    for path in (folder / f"lib{name}.so", folder / f"lib{name}.dylib", folder / f"{name}.dll"):
        if path.is_file():
            return path
    raise UserError(
        f"lib{name} is not in {folder}: llama.cpp must be built with shared libraries; run `pipeline setup`"
    )


@cache
def _ggml() -> ctypes.CDLL:
    library = shared_library("ggml-base")
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_get_type_traits.argtypes = (ctypes.c_int,)
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    return library


@cache
def tensor_type(id: int) -> TensorType | None:
    """The type of a number in a GGUF file; None for one that this build does not know."""
    if not 0 <= id < _TYPE_COUNT:
        return None
    traits = _ggml().ggml_get_type_traits(id).contents
    if traits.blck_size <= 0 or traits.type_size <= 0:  # a number that is no longer used
        return None
    return TensorType(id, traits.type_name.decode(), traits.blck_size, traits.type_size, traits.is_quantized)


def all_finite(type: TensorType, data: "NDArray[np.uint8]") -> bool:
    """Whether no value, or no scale of a block, is NaN or infinite. The library names the block on standard error."""
    finite: bool = _ggml().ggml_validate_row_data(type.id, data.ctypes.data, data.nbytes)
    return finite


def dequantize(type: TensorType, data: "NDArray[np.uint8]") -> "NDArray[np.float32]":
    """The values of whole blocks, as float32."""
    import numpy as np

    if type.name == "f32":
        return data.view(np.float32)
    if type.name in ("f64", "i8", "i16", "i32", "i64"):
        return data.view(type.name.replace("f64", "float64").replace("i", "int")).astype(np.float32)
    values = np.empty(data.nbytes // type.bytes * type.block, dtype=np.float32)
    _ggml().ggml_get_type_traits(type.id).contents.to_float(data.ctypes.data, values.ctypes.data, values.size)
    return values

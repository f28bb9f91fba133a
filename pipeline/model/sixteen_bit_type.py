"""The 16-bit type that a model is merged into and converted to, float16 or bfloat16: that of most of its numbers.

A float32 model becomes bfloat16, whose range is that of float32: in float16 a number beyond 65,504 would become
infinite, and one below 6e-8 zero.
"""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.model.weights_file import Weights

_OF_STORED = {"F16": "f16", "BF16": "bf16", "F32": "bf16"}  # as safetensors names them
TORCH_TYPES = {"f16": "float16", "bf16": "bfloat16"}  # torch's names


def sixteen_bit_type(weights: Weights) -> str:
    """The type of a folder's weights in 16 bits: "f16" or "bf16".

    Raises:
        UserError: they are not stored in 16 or 32 bits.
    """
    if weights.main_type not in _OF_STORED:
        raise UserError(f"{weights.folder}: holds {weights.main_type} weights: they must be stored in 16 or 32 bits")
    return _OF_STORED[weights.main_type]

"""The quantization types, as the pinned llama-quantize lists them: names, numbers, and what a name promises.

The list comes from the program's own help text, so that it cannot be another version's.
"""

import difflib
import re
import subprocess
from dataclasses import dataclass
from functools import cache

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.programs import program

# The help text gives a size in GiB on these models: their numbers of parameters make it bits per weight.
_PARAMETERS = {"Llama-3-8B": 8_030_261_248, "Mistral-7B": 7_241_732_096}
_EXACT_BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0}
# Types whose files have tensors that llama-quantize refuses to make without an importance matrix
# (tensor_requires_imatrix in src/llama-quant.cpp).
_NEED_IMPORTANCE_MATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
_LINE = re.compile(r"^\s*(\d+)\s+or\s+(\w+)\s*:\s*(.*)$")


@dataclass(frozen=True)
class QuantizationType:
    """A type of llama-quantize.

    Attributes:
        name: as llama-quantize spells it, e.g. "Q4_K_M".
        number: its number in a file's general.file_type.
        promised_bits: bits per weight that the name stands for on a model whose every tensor fits; None where
            llama-quantize does not say.
    """

    name: str
    number: int
    promised_bits: float | None

    @property
    def needs_importance_matrix(self) -> bool:
        """Whether llama-quantize makes it only with an importance matrix."""
        return self.name in _NEED_IMPORTANCE_MATRIX


def quantization_type(name: str) -> QuantizationType:
    """A type by its name, in upper or lower case; an alias (Q4_K) gives what it stands for (Q4_K_M).

    Raises:
        UserError: there is none of that name, with the nearest ones, or it cannot be made here.
    """
    types = quantization_types()
    known = types.get(name.upper())
    if known is None:
        nearest = difflib.get_close_matches(name.upper(), types, 3, 0.5)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known are: {', '.join(types)}"
        raise UserError(f"export.quant: llama-quantize has no type {name}; {hint}")
    return known


@cache
def quantization_types() -> dict[str, QuantizationType]:
    """Every name that llama-quantize takes, in its order, aliases included."""
    result = subprocess.run([program("llama-quantize"), "--help"], capture_output=True, text=True, check=False)
    rows = [match.groups() for line in (result.stdout + result.stderr).splitlines() if (match := _LINE.match(line))]
    if not rows:
        raise PipelineError(f"llama-quantize lists no types: {(result.stderr or result.stdout).strip()[-500:]}")
    types = {
        name: QuantizationType(name, int(number), _promised_bits(name, text))
        for number, name, text in rows
        if not text.startswith("alias")
    }
    aliases = {name: types[text.split()[-1]] for _, name, text in rows if text.startswith("alias")}
    return {name: (types | aliases)[name] for _, name, _ in rows}


def _promised_bits(name: str, text: str) -> float | None:
    if name in _EXACT_BITS:
        return _EXACT_BITS[name]
    if bits := re.search(r"([\d.]+)\s+bpw", text):
        return float(bits[1])
    size = re.search(r"([\d.]+)G\b.*@ (\S+)", text)
    if size and size[2] in _PARAMETERS:
        return float(size[1]) * 2**30 * 8 / _PARAMETERS[size[2]]
    return None

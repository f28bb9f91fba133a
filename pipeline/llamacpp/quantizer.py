"""The pinned llama-quantize: its types and what their names promise, what it makes of a file, and what it says of it.

The types come from the program's own help text, so that they cannot be another version's. A type's name is no promise
that every tensor is stored in it: a row that is no multiple of the type's block falls back to another type, with a
warning and exit status 0. What it says of every tensor is read here.
"""

import difflib
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.programs import program
from pipeline.processes import failure, follow

# The help text gives a size in GiB on these models: their numbers of parameters make it bits per weight.
_PARAMETERS = {"Llama-3-8B": 8_030_261_248, "Mistral-7B": 7_241_732_096}
_EXACT_BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0}
# Types whose files have tensors that llama-quantize refuses to make without an importance matrix
# (tensor_requires_imatrix in src/llama-quant.cpp).
_NEED_IMPORTANCE_MATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
_LINE = re.compile(r"^\s*(\d+)\s+or\s+(\w+)\s*:\s*(.*)$")
# Two lines of its output: a tensor that falls back, and the tensor with the type that it is stored in. Examples:
#   warning: blk.0.attn_q.weight - ncols 576 not divisible by 256 (required for type q4_K) -> falling back to q5_0
#   [ 4/272] blk.0.attn_q.weight - [ 576, 576, 1, 1], type = f16, converting to q5_0 .. size = 0.63 MiB -> 0.22 MiB
_FALLBACK = re.compile(
    r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+(\d+) \(required for type\s+(\S+)\)"
    r"(?:.*-> falling back to\s+(\S+))?"
)
_TENSOR = re.compile(r"\[\s*(\d+)/\s*\d+\]\s+(\S+)\s+- \[.*?\], type =\s+(\w+),")
_CONVERTED = re.compile(r"converting to (\S+) \.\.|\((\S+)\)\s*$")  # the second is that of a dry run


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


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows do not fit the type that was meant for it.

    Attributes:
        tensor: its name.
        row: numbers in a row.
        block: what a row must be a multiple of.
        meant: the type that does not fit.
        taken: the type that it is stored in; "" where there is none, and quantizing failed.
    """

    tensor: str
    row: int
    block: int
    meant: str
    taken: str


@dataclass
class Quantization:
    """What llama-quantize said of a file.

    Attributes:
        types: the type that every tensor is stored in, by name, e.g. "q4_K".
        fallbacks: the tensors that are stored in another type than was meant.
        warnings: other warnings, as they were printed.
    """

    types: dict[str, str] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def read(self, line: str) -> None:
        """Take in a line of its output."""
        if match := _FALLBACK.search(line):
            name, row, block, meant, taken = match.groups()
            self.fallbacks.append(Fallback(name, int(row), int(block), meant, taken or ""))
        elif match := _TENSOR.search(line):
            converted = _CONVERTED.search(line, match.end())
            self.types[match[2]] = next(filter(None, converted.groups())) if converted else match[3]
        elif re.search(r"\bwarning\b", line, re.IGNORECASE) and "required fallback" not in line:
            self.warnings.append(line.strip())


def command(source: Path, target: Path, kind: str) -> list[str | Path]:
    """The argument list that quantizes a file.

    Args:
        source: a GGUF file in 16 or 32 bits.
        target: the file to write.
        kind: a type's name, in upper or lower case.
    """
    return [program("llama-quantize"), source, target, kind.upper()]


def quantize(
    source: Path, target: Path, kind: str, on_line: Callable[[str, int], None] = lambda line, tensors: None
) -> Quantization:
    """Quantize a file.

    Args:
        source, target, kind: as `command` takes them.
        on_line: called with every line of its output, and with how many tensors are done.

    Raises:
        UserError: this model cannot be stored in this type.
        PipelineError: llama-quantize failed, with its words.
    """
    return _run(command(source, target, kind), kind, on_line, target.parent)


def dry_run(source: Path, kind: str) -> Quantization:
    """What `quantize` would make of a file: which tensor gets which type is llama-quantize's own choice.

    Nothing is computed and nothing written.

    Raises:
        PipelineError: llama-quantize failed, with its words.
    """
    said = _run([program("llama-quantize"), "--dry-run", source, kind.upper()], kind)
    if not said.types:
        raise PipelineError(f"llama-quantize --dry-run to {kind.upper()} named no tensor")
    return said


def importance_matrix_needed(kind: str) -> UserError:
    """The error for a type that is made only with an importance matrix."""
    return UserError(
        f"export.quant: {kind.upper()} needs an importance matrix, which this program does not compute: take a larger "
        "type, e.g. q3_k_m or iq3_m"
    )


def _run(
    arguments: list[str | Path],
    kind: str,
    on_line: Callable[[str, int], None] = lambda line, tensors: None,
    folder: Path | None = None,
) -> Quantization:
    said = Quantization()
    output: list[str] = []

    def read(line: str) -> None:
        said.read(line)
        on_line(line, len(said.types))
        if not _TENSOR.search(line):  # what is left tells why it failed
            output.append(line)

    status = follow(arguments, on_line=read)
    if status:
        words = "\n".join(output)
        if "requires an imatrix" in words or "importance matrix" in words:
            raise importance_matrix_needed(kind)
        if "no tensor type fallback" in words and said.fallbacks:
            last = said.fallbacks[-1]
            raise UserError(
                f"export.quant: {kind.upper()} cannot store this model: the rows of {last.tensor} ({last.row}) are no "
                f"multiple of {last.block}: take another type, e.g. q4_k_m"
            )
        raise failure(f"llama-quantize to {kind.upper()}", status, output, folder)
    return said

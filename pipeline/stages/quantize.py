"""quantize: one GGUF for every type of `[export] quant`, and what its name is really worth on this model.

A K-quant wants rows that are a multiple of 256. Where they are not, llama-quantize takes another type, says so in
a warning and exits 0: the file is then larger, and better, than its name. How much of it is counted here.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import console
from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.gguf_file import GGUFInfo, check, inspect
from pipeline.llamacpp.programs import failure, installed, program, require_space, run
from pipeline.llamacpp.quantizer import QuantizationType, quantization_type
from pipeline.run.stage import Stage, Task

if TYPE_CHECKING:
    from pipeline.config import Config

_NO_IMPORTANCE_MATRIX = (
    "export.quant: {} needs an importance matrix, which this program does not compute: take a larger type, e.g. "
    "q3_k_m or iq3_m"
)
_FALLBACK = re.compile(
    r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by (\d+) \(required for type\s+(\S+)\)"
    r"(?: -> falling back to\s+(\S+))?"
)


def variants(config: "Config") -> tuple[str, ...]:
    """One node for every type. One that cannot be made is refused here, before anything is trained."""
    names = tuple(dict.fromkeys(name.lower() for name in config.export.quant))
    for name in names:
        if installed("llama-quantize") and quantization_type(name).needs_importance_matrix:
            raise UserError(_NO_IMPORTANCE_MATRIX.format(name.upper()))
    return names


def main(task: Task) -> dict[str, Any]:
    """Write and check `model-<type>.gguf`."""
    source = task.layout.gguf_16bit()
    wanted = quantization_type(task.variant)
    target = task.new(task.layout.quantized(task.variant))
    whole = inspect(source)
    bits = max(wanted.promised_bits or 16.0, 4.5)
    require_space(task.output, int(whole.parameter_count * bits / 8), f"{wanted.name}")
    fallbacks = quantize(task, source, target, wanted, len(whole.tensors))

    info = check(target)
    check_against(info, whole, wanted)
    fallen = {name: rows for name, rows, *_ in fallbacks}
    fallen_parameters = sum(info.names[name].elements for name in fallen)
    figures = {
        "file": target.name,
        "bytes": info.size,
        "type": wanted.name,
        "bits_per_weight": round(info.bits_per_weight, 3),
        "promised_bits_per_weight": round(wanted.promised_bits, 3) if wanted.promised_bits else None,
        "tensors": len(info.tensors),
        "tensor_types": info.tensor_types,
        "parameters_by_type": info.parameters_by_type,
        "fallback_tensors": len(fallen),
        "fallback_share": round(fallen_parameters / info.parameter_count, 4),
        "compression": round(whole.tensor_bytes / info.tensor_bytes, 3),
    }
    if fallen:
        promise = f" instead of about {wanted.promised_bits:.2f}" if wanted.promised_bits else ""
        task.warn(
            f"{wanted.name}: {len(fallen)} of {len(info.tensors)} tensors ({figures['fallback_share']:.0%} of the "
            f"parameters) fell back to another type, because their rows ({', '.join(sorted(set(fallen.values())))}) "
            f"are no multiple of its block: {info.bits_per_weight:.2f} bits per weight{promise}"
        )
    return figures


def quantize(
    task: Task, source: Path, target: Path, wanted: QuantizationType, tensors: int
) -> list[tuple[str, str, str, str, str]]:
    """Run llama-quantize.

    Returns:
        For every tensor that fell back: its name, its row's length, the block it does not fit, the type that was
        meant and the one that was taken.
    """
    arguments: list[str | Path] = [program("llama-quantize"), source, target, wanted.name]
    task.command(arguments)
    output: list[str] = []
    fallbacks: list[tuple[str, str, str, str, str]] = []
    with console.progress(f"quantizing to {wanted.name}", tensors, "tensors") as update:

        def read(line: str) -> None:
            print(line)
            if done := re.match(r"\[\s*(\d+)/\s*\d+\]", line):
                update(float(done[1]))
                if "converting to" in line or "size =" in line:
                    return
            output.append(line)
            if match := _FALLBACK.search(line):
                name, rows, block, meant, taken = match.groups()
                fallbacks.append((name, rows, block, meant, taken or ""))
            elif re.search(r"\bwarning\b", line, re.IGNORECASE) and "required fallback" not in line:
                task.warn(f"llama-quantize: {line.strip()}")

        status = run(arguments, on_line=read)
    if status:
        said = "\n".join(output)
        if "requires an imatrix" in said or "importance matrix" in said:
            raise UserError(_NO_IMPORTANCE_MATRIX.format(wanted.name))
        if "no tensor type fallback" in said:
            rows = fallbacks[-1] if fallbacks else ("a tensor", "?", "?", "", "")
            raise UserError(
                f"export.quant: {wanted.name} cannot store this model: the rows of {rows[0]} ({rows[1]}) are no "
                f"multiple of {rows[2]}: take another type, e.g. q4_k_m"
            )
        raise failure(f"llama-quantize to {wanted.name}", status, output, target.parent)
    return fallbacks


def check_against(info: GGUFInfo, source: GGUFInfo, wanted: QuantizationType) -> None:
    """Compare a quantized file with the one that it was made from.

    Raises:
        PipelineError: a tensor is missing or has another shape, or the metadata is not the same.
    """
    if info.metadata.get("general.file_type") != wanted.number:
        raise PipelineError(
            f"{info.path.name}: general.file_type is {info.metadata.get('general.file_type')}, not the "
            f"{wanted.number} of {wanted.name}"
        )
    shapes = {tensor.name: tensor.shape for tensor in info.tensors}
    if shapes != {tensor.name: tensor.shape for tensor in source.tensors}:
        raise PipelineError(f"{info.path.name}: its tensors are not those of {source.path.name}")
    changed = [
        key
        for key in source.metadata.keys() | info.metadata.keys()
        if not key.startswith(("general.file_type", "general.quantization_version", "quantize.", "split."))
        and source.metadata.get(key) != info.metadata.get(key)
    ]
    if changed:
        raise PipelineError(f"{info.path.name}: metadata changed by quantizing: {', '.join(sorted(changed))}")


STAGE = Stage(
    name="quantize",
    summary="Quantize the GGUF with llama-quantize.",
    run=main,
    needs=("convert",),
    programs=("llama.cpp",),
    variants=variants,
    figures=("type", "bytes", "bits_per_weight", "fallback_share"),
    rung=True,
)

"""quantize: one GGUF for every type of `[export] quant`, and what its name is really worth on this model.

A K-quant wants rows that are a multiple of 256. Where they are not, llama-quantize takes another type, says so in
a warning and exits 0: the file is then larger, and better, than its name. How much of it is counted here.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import console
from pipeline.errors import PipelineError
from pipeline.llamacpp import quantizer
from pipeline.llamacpp.gguf_file import GGUFInfo, check, inspect
from pipeline.llamacpp.programs import installed
from pipeline.llamacpp.quantizer import Quantization, QuantizationType, quantization_type
from pipeline.model.memory import quantized_file
from pipeline.processes import require_space
from pipeline.run.stage import Stage, Task

if TYPE_CHECKING:
    from pipeline.config import Config


def variants(config: "Config") -> tuple[str, ...]:
    """One node for every type. One that cannot be made is refused here, before anything is trained."""
    names = tuple(dict.fromkeys(name.lower() for name in config.export.quant))
    for name in names:
        if installed("llama-quantize") and quantization_type(name).needs_importance_matrix:
            raise quantizer.importance_matrix_needed(name)
    return names


def main(task: Task) -> dict[str, Any]:
    """Write and check `model-<type>.gguf`."""
    source = task.layout.gguf_16bit()
    wanted = quantization_type(task.variant)
    target = task.new(task.layout.quantized(task.variant))
    whole = inspect(source)
    needed = quantized_file(whole.parameter_count, wanted.promised_bits)
    require_space(task.output, needed, wanted.name)
    said = quantize(task, source, target, wanted.name, len(whole.tensors))

    info = check(target)
    check_against(info, whole, wanted)
    fallen = {fallback.tensor: fallback.row for fallback in said.fallbacks}
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
        rows = ", ".join(map(str, sorted(set(fallen.values()))))
        promise = f" instead of about {wanted.promised_bits:.2f}" if wanted.promised_bits else ""
        task.warn(
            f"{wanted.name}: {len(fallen)} of {len(info.tensors)} tensors ({figures['fallback_share']:.0%} of the "
            f"parameters) fell back to another type, because their rows ({rows}) "
            f"are no multiple of its block: {info.bits_per_weight:.2f} bits per weight{promise}"
        )
    return figures


def quantize(task: Task, source: Path, target: Path, kind: str, tensors: int) -> Quantization:
    """Run llama-quantize, with a bar and its warnings."""
    task.command(quantizer.command(source, target, kind))
    with console.progress(f"quantizing to {kind}", tensors, "tensors") as update:

        def on_line(line: str, done: int) -> None:
            print(line)
            update(done)

        said = quantizer.quantize(source, target, kind, on_line)
    for warning in said.warnings:
        task.warn(f"llama-quantize: {warning}")
    return said


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
    reads={"convert": ("*.gguf",)},
    programs=("llama.cpp",),
    variants=variants,
    figures=("type", "bytes", "bits_per_weight", "fallback_share"),
    judged=True,
)

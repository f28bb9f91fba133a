"""The pinned converter, run once more on a model's folder: what any GGUF file of that model has to hold.

Converting is deterministic. So a 16-bit file by whatever program is right if it has these tensors and this metadata;
no table of architectures is needed to say so.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.llamacpp import converter
from pipeline.llamacpp.gguf_file import GGUFInfo, inspect
from pipeline.model import memory
from pipeline.model.weights_file import read_weights
from pipeline.ollama.llamacpp_rendering import as_carried
from pipeline.processes import require_space

_UNQUANTIZED = {0: "f32", 1: "f16", 32: "bf16"}  # general.file_type


def unquantized_type(path: Path) -> str | None:
    """ "f32", "f16" or "bf16"; None for a quantized GGUF file.

    Raises:
        PipelineError: it is no GGUF file.
    """
    return _UNQUANTIZED.get(inspect(path).metadata.get("general.file_type", -1))


def reconvert(model: Path, folder: Path, outtype: str, *, without_weights: bool = False) -> GGUFInfo:
    """Convert a Hugging Face folder.

    Args:
        model: the folder.
        folder: where the file is written.
        outtype: "f32", "f16" or "bf16".
        without_weights: the folder has none: the file is metadata without tensors.

    Raises:
        PipelineError: the converter refuses the model, with its words.
    """
    target = folder / f"again-{outtype}.gguf"
    if not target.is_file():
        if not without_weights:
            size = memory.float32_file if outtype == "f32" else memory.sixteen_bit_file
            require_space(folder, size(read_weights(model).parameters), "the model, converted again")
        partial = target.with_suffix(".partial")
        command = converter.command(as_carried(model, folder / "carried" / model.name), partial, outtype)
        converter.convert([*command, *(("--vocab-only",) if without_weights else ())], folder)
        partial.rename(target)
    return inspect(target)

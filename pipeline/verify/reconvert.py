"""The pinned converter, run once more on a model's folder: what any GGUF file of that model has to hold.

Converting is deterministic. So a 16-bit file by whatever program is right if it has these tensors and this metadata;
no table of architectures is needed to say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.llamacpp import converter
from pipeline.llamacpp.gguf_file import GGUFInfo, inspect
from pipeline.llamacpp.programs import require_space

_UNQUANTIZED = {0: "f32", 1: "f16", 32: "bf16"}  # general.file_type


def unquantized_type(path: Path) -> str | None:
    """ "f32", "f16" or "bf16"; None for a quantized GGUF file.

    Raises:
        PipelineError: it is no GGUF file.
    """
    return _UNQUANTIZED.get(inspect(path).metadata.get("general.file_type", -1))


def reconvert(model: Path, folder: Path, outtype: str) -> GGUFInfo:
    """Convert a Hugging Face folder.

    Args:
        model: the folder.
        folder: where the file is written.
        outtype: "f32", "f16" or "bf16".

    Raises:
        PipelineError: the converter refuses the model, with its words.
    """
    target = folder / f"again-{outtype}.gguf"
    if not target.is_file():
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        require_space(folder, 2 * size if outtype == "f32" else size, "the model, converted again")
        partial = target.with_suffix(".partial")
        converter.convert(converter.command(model, partial, outtype), folder)
        partial.rename(target)
    return inspect(target)


def stored_outtype(model: Path) -> str:
    """The 16-bit type that keeps a folder's weights as they are: bf16 where most of them are, else f16."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  (the file is no mapping)
                part: Any = file.get_slice(name)
                count = 1
                for length in part.get_shape():
                    count *= length
                sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + count
    return "bf16" if sizes and max(sizes, key=lambda name: sizes[name]) == "BF16" else "f16"

"""The guard: a comment in front of a GGUF's Jinja that keeps Ollama from replacing it.

Without a TEMPLATE, `ollama create` compares the Jinja with a built-in list and installs a stock Go template where fewer
than 100 characters differ. A comment renders to nothing, and each of its 128 double lines occurs in no template, so
each is one difference.
"""

import struct
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.llamacpp.gguf_file import inspect

_SIZE = 512  # bytes: a multiple of every alignment in use, so that what follows in the file only moves
_WORDS = "{# Rendered by llama.cpp as it stands, and not to be taken for one of Ollama's stock templates. "
_LINES = "\u2550" * 128
_PIECE = 16 << 20


def _guard(end: str) -> str:
    bare = f"{_WORDS}{_LINES}#}}{end}"
    return f"{_WORDS}{_LINES}{' ' * (_SIZE - len(bare.encode()))}#}}{end}"


def guarded(source: str) -> str:
    """The Jinja template with the comment in front; unchanged if it has it already."""
    if source.startswith(_WORDS):
        return source
    # A line break right after a comment is not rendered: one more keeps the template's own.
    return _guard("\n" if source.startswith("\n") else "") + source


def write_guarded(source: Path, target: Path) -> None:
    """Copy a GGUF file, putting the guard in front of its chat template; everything else stays as it is.

    Raises:
        PipelineError: it has no chat template, or a form that is not understood.
    """
    info = inspect(source)
    template = info.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str):
        raise PipelineError(f"{source}: has no chat template (tokenizer.chat_template)")
    text = template.encode()
    added = guarded(template).encode()[: len(guarded(template).encode()) - len(text)]
    if len(added) % int(info.metadata.get("general.alignment", 32)):
        raise PipelineError(
            f"{source}: general.alignment is {info.metadata['general.alignment']}, a guard needs 512 or less"
        )
    key = b"tokenizer.chat_template"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(text)) + text
    with source.open("rb") as old, target.open("wb") as new:
        header = old.read(min(tensor.offset for tensor in info.tensors))
        if header.count(entry) != 1:
            raise PipelineError(f"{source}: its chat template was not found where it should be")
        place = header.index(entry) + len(entry) - len(text)
        new.write(header[: place - 8] + struct.pack("<Q", len(added) + len(text)) + added + header[place:])
        while piece := old.read(_PIECE):
            new.write(piece)

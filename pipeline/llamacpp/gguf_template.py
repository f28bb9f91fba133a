"""The chat template that a GGUF file carries: read with what it depends on, and replaced in a copy of the file."""

import struct
from pathlib import Path

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.prompt.guard import SIZE
from pipeline.prompt.template import ChatTemplate, in_order

_CONTROL = 3  # a special token, in tokenizer.ggml.token_type
_PIECE = 16 << 20  # bytes copied at once


def template_of(path: Path) -> ChatTemplate:
    """The template that a GGUF file carries.

    Raises:
        UserError: it carries none.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    metadata = inspect(path).metadata
    if not metadata.get("tokenizer.chat_template"):
        raise UserError(f"{path}: carries no chat template")
    source = metadata["tokenizer.chat_template"]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    kinds = metadata.get("tokenizer.ggml.token_type", [])

    def text(key: str) -> str:
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return str(tokens[number]) if number is not None and number < len(tokens) else ""

    special = {token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL}
    return ChatTemplate(
        source,
        text("bos"),
        text("eos"),
        adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")),
        special_tokens=in_order(special, source),
        architecture=str(metadata.get("general.architecture", "")),
    )


def write_with_template(source: Path, target: Path, shipped: str) -> None:
    """Copy a GGUF file, with a guard in front of its chat template; everything else stays as it is.

    Args:
        shipped: the guarded template.

    Raises:
        PipelineError: the file has another chat template, or a form that is not understood.
    """
    info = inspect(source)
    template = info.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str) or not shipped.endswith(template):
        raise PipelineError(f"{source}: has another chat template (tokenizer.chat_template) than the merged model")
    text = template.encode()
    added = shipped.encode()[: -len(text)]
    alignment = int(info.metadata.get("general.alignment", 32))
    if len(added) % alignment:
        raise PipelineError(f"{source}: general.alignment is {alignment}, but a guard is made for {SIZE} or less")
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

"""A GGUF file, served by llama-server as it was trained."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.llamacpp.gguf_template import template_of
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.prompt.guard import guarded


def llama_server(
    gguf: Path, context: int = 4096, log: Path | None = None, adapters: Sequence[Path] = ()
) -> LlamaServer:
    """A llama-server that renders a file's chat template as it was trained: it would give it a date, and say to think.

    Args:
        gguf: the file.
        context: tokens of context.
        log: where its log and the template are kept, if they are.
        adapters: LoRA adapters as GGUF.

    Raises:
        UserError: there is no such file, or it carries no chat template.
    """
    template = guarded(template_of(gguf).source, thinking_not_said=True)
    return LlamaServer(gguf, adapters=adapters, context=context, template=template, log=log)

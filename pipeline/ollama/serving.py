"""A GGUF file, served by llama-server as it was trained."""

from pathlib import Path

from pipeline.llamacpp.gguf_template import template_of
from pipeline.llamacpp.server import LlamaServer
from pipeline.prompt.guard import guarded


def llama_server(gguf: Path, context: int = 4096) -> LlamaServer:
    """A llama-server that renders a file's chat template as it was trained: it would give it a date, and say to think.

    Raises:
        UserError: there is no such file, or it carries no chat template.
    """
    template = guarded(template_of(gguf).source, thinking_not_said=True)
    return LlamaServer(gguf, context=context, template=template)

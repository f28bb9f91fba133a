"""A GGUF file, served by llama-server as it was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.questions import Question
from pipeline.llamacpp.gguf_file import inspect
from pipeline.llamacpp.gguf_template import template_of
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.ollama.parameters import LARGEST_DEFAULT_CONTEXT
from pipeline.prompt.guard import guarded
from pipeline.prompt.lengths import question_lengths


def context_for(tokenizer: Any, questions: Sequence[Question], answer: int, made_for: int | None) -> int:
    """The tokens that hold the longest question and its answer, or as many as the model was made for.

    Args:
        tokenizer: the one that is trained with.
        questions: what the model will be asked.
        answer: tokens of the longest answer.
        made_for: of the model; None where its files do not say.
    """
    needed = max(question_lengths(tokenizer, questions), default=0) + answer
    return needed if made_for is None else min(needed, made_for)


def llama_server(
    gguf: Path, context: int | None = None, log: Path | None = None, adapters: Sequence[Path] = ()
) -> LlamaServer:
    """A llama-server that renders a file's chat template as it was trained: it would give it a date, and say to think.

    Args:
        gguf: the file.
        context: tokens of context; None for what Ollama would be given by default.
        log: where its log and the template are kept, if they are.
        adapters: LoRA adapters as GGUF.

    Raises:
        UserError: there is no such file, or it carries no chat template.
    """
    if context is None:
        info = inspect(gguf)
        made_for = info.metadata.get(f"{info.architecture}.context_length", LARGEST_DEFAULT_CONTEXT)
        context = min(made_for, LARGEST_DEFAULT_CONTEXT)
    template = guarded(template_of(gguf).source, thinking_not_said=True)
    return LlamaServer(gguf, adapters=adapters, context=context, template=template, log=log)

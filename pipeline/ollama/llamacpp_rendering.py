"""What llama.cpp renders, and the chat template that a GGUF file carries because of it.

A file carries the trained template, unless llama.cpp cannot do what it says: Mistral Nemo's it cannot read, so that no
program on llama.cpp could chat with the file, and Ollama neither. Such a file carries `pipeline.prompt.plain_jinja`,
which does with plain conversations what was trained, proven on the same suite; tools are left out. Where that is not
exact either, the file carries the trained one, and the checks say what differs.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.llamacpp.llama_server import LlamaServer, Refused
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.prompt.cases import Case, conversations
from pipeline.prompt.conformance import RenderRefused, judge, reordered, unreasoned
from pipeline.prompt.guard import guarded
from pipeline.prompt.plain_jinja import plain_jinja
from pipeline.prompt.template import ChatTemplate
from pipeline.prompt.template_pieces import NotDerivable
from pipeline.prompt.tokenizer import read_saved

# The files that say what the chat template is.
_WITH_TEMPLATE = ("chat_template.jinja", "chat_template.json", "additional_chat_templates", "tokenizer_config.json")


@dataclass(frozen=True)
class Carried:
    """A GGUF file's chat template.

    Attributes:
        jinja: the template.
        left_out: why it is not the trained one, and what it does not do; "" if it is.
    """

    jinja: str
    left_out: str = ""


@lru_cache(maxsize=8)  # a llama-server is asked for sixty prompts, and what is asked of it stays the same
def carried_template(template: ChatTemplate) -> Carried:
    """The chat template that the GGUF files of a model carry, found out with a real llama-server.

    Args:
        template: the trained one.
    """
    difference = _difference(template, template.source)
    if difference:
        try:
            plain = plain_jinja(template)
        except NotDerivable:
            return Carried(template.source)
        if not _difference(template, plain):
            words = "the GGUF file carries one derived from it, for plain conversations: tools are left out"
            return Carried(plain, f"llama.cpp does not do what the chat template says ({difference}), so {words}")
    return Carried(template.source)


def _difference(template: ChatTemplate, jinja: str) -> str:
    """What llama.cpp makes of a Jinja and was not trained, in words; "" if nothing."""
    shipped = template.with_source(guarded(jinja, thinking_not_said=True))
    with tempfile.TemporaryDirectory(prefix="pipeline-template-") as scratch:
        path = write_scratch_model(Path(scratch) / "scratch.gguf", shipped)
        try:
            with LlamaServer(path, context=256) as server:
                suite = conversations(template.special_tokens)
                report = judge(template, suite, lambda case: ask_llama_server(server, shipped, case), joins=False)
        except Refused as error:
            said = [line.strip() for line in str(error).splitlines()]
            return next((line for line in said if line.startswith("Error:")), said[-1])
    return "" if report.exact else report.summary


def as_carried(model: Path, folder: Path) -> Path:
    """What is converted: a model's folder, or links to its files with the chat template that the GGUF file carries.

    Args:
        model: a Hugging Face folder.
        folder: a new one, for the links.
    """
    if not read_saved(model).chat_template:
        return model
    template = ChatTemplate.from_folder(model)
    carried = carried_template(template)
    if carried.jinja == template.source:
        return model
    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.name not in _WITH_TEMPLATE:
            (folder / path.name).symlink_to(path.resolve())
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_bytes(carried.jinja.encode())
    return folder


def ask_llama_server(server: LlamaServer, template: ChatTemplate, conversation: Case) -> str:
    """A conversation's prompt from llama-server, asked for it as Ollama asks: reasoning beside a text goes on to none.

    Args:
        server: has the template.
        template: the one that the file carries.
        conversation: what is asked for.

    Raises:
        RenderRefused: the template refuses it; or wants no tools, and Ollama would not hand them on.
    """
    fields: dict[str, Any] = {}
    if conversation.tools:
        if "tools" not in template.source and "tool_call" not in template.source:
            raise RenderRefused("it does not support tools")
        fields["tools"] = reordered(conversation.tools)
    think = conversation.think
    if think is None and "<think>" in template.source and "</think>" in template.source:
        think = True  # what Ollama says for a model that can think, when nothing is said
    if think is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": think}
    try:
        return server.apply_template(unreasoned(conversation.messages), **fields)
    except Refused as error:
        raise RenderRefused(str(error)) from None

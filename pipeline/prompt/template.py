"""A model's own chat template: the Jinja that the trainer used, rendered in the sandbox that transformers uses.

This is the measure for everything that a server sends.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.prompt.tokenizer import saved_tokenizer


class TemplateRefused(Exception):
    """The template raised: it does not take this conversation."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and what it depends on.

    Attributes:
        source: the Jinja text.
        bos_token, eos_token: their texts, "" where there is none.
        adds_bos: whether the tokenizer puts BOS in front of every text by itself (as a server then does).
        special_tokens: texts of all special tokens, those that the template writes first.
        variables: further variables that transformers gives the template (unk_token, pad_token, ...).
        architecture: the model's, which Ollama looks at too; "" if it is not known.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""
    adds_bos: bool = False
    special_tokens: tuple[str, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = ""

    @staticmethod
    def from_folder(folder: Path) -> ChatTemplate:
        """The template of a tokenizer's folder.

        Raises:
            UserError: there is no tokenizer, or it has no chat template.
        """
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a model's folder or a .jinja file")
        return ChatTemplate.from_tokenizer(saved_tokenizer(folder), str(folder))

    @staticmethod
    def from_tokenizer(tokenizer: Any, where: str = "the tokenizer") -> ChatTemplate:
        """The template of a loaded tokenizer: the one that `apply_chat_template` takes by itself."""
        source = tokenizer.chat_template
        if isinstance(source, dict):
            source = source.get("default")
        if not source:
            raise UserError(f"{where} has no chat template: there is nothing to say how a conversation is sent")
        plain = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        beginning = tokenizer("a").input_ids[:1]
        return ChatTemplate(
            source,
            plain.get("bos_token", ""),
            plain.get("eos_token", ""),
            adds_bos=bool(beginning) and beginning[0] == tokenizer.bos_token_id,
            special_tokens=in_order(added | set(tokenizer.all_special_tokens), source),
            variables=dict(tokenizer.special_tokens_map),
            architecture=_architecture(Path(tokenizer.name_or_path) / "config.json"),
        )

    @staticmethod
    def from_file(path: Path) -> ChatTemplate:
        """A template alone, e.g. one that llama.cpp ships; its BOS is taken to be "<s>"."""
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), "<s>", "</s>")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as text: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        think: bool | None = None,
        today: datetime.datetime | None = None,
    ) -> str:
        """The prompt, with the generation prompt at its end.

        Args:
            messages: the conversation.
            tools: JSON schemas.
            think: given to the template as `enable_thinking`, unless None.
            today: the date that the template sees; default: the real one.

        Raises:
            TemplateRefused: with the template's own words.
            UserError: the template is no valid Jinja.
        """
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        names: dict[str, Any] = {"bos_token": self.bos_token, "eos_token": self.eos_token, **self.variables}
        if think is not None:
            names["enable_thinking"] = think
        if today is not None:
            names["strftime_now"] = today.strftime
        plain = json.loads(json.dumps([dict(message) for message in messages]))
        try:
            rendered, _ = render_jinja_template(
                conversations=[plain],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.source,
                add_generation_prompt=True,
                **names,
            )
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from None
        except TemplateError as error:
            raise TemplateRefused(str(error)) from None
        except Exception as error:  # it is somebody's program: it may end in anything
            raise TemplateRefused(f"{type(error).__name__}: {error}") from None
        text: str = rendered[0]
        return text

    def served(self, rendered: str) -> str:
        """What a server has to send for this rendering: without the BOS that the tokenizer will add."""
        return rendered.removeprefix(self.bos_token) if self.adds_bos and self.bos_token else rendered

    def with_source(self, source: str) -> ChatTemplate:
        """The same tokenizer with another template."""
        return replace(self, source=source)


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Render a conversation as transformers does.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: {"role", "content"} and what else the template knows.
        add_generation_prompt: end with what makes the model answer.
        tools: JSON schemas of the tools that the model may call.
        variables: further variables of the template, e.g. enable_thinking=False.

    Raises:
        UserError: there is no template, or it refuses these messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, so there is no text to train on: name one in model.chat_template"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **variables,
            )
        )
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        # Templates refuse with raise_exception, and trip over what their author did not think of in any way.
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise UserError(f"the model's chat template refuses a conversation of ({roles}): {error}") from None


def in_order(tokens: Iterable[str], source: str) -> tuple[str, ...]:
    """Special tokens, those that a template writes first."""
    return tuple(sorted(tokens, key=lambda token: (token not in source, token)))


def _architecture(config: Path) -> str:
    """What a model's GGUF will name its architecture, as far as Ollama asks for it: there the names are the same."""
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["model_type"]).removesuffix("_text")
    except (OSError, ValueError, KeyError, TypeError):
        return ""

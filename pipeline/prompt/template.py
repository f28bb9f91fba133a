"""A model's own chat template: the Jinja that the trainer used, rendered in the sandbox that transformers uses.

This is the measure for everything that a server sends, and the home of three facts: how a conversation is rendered,
whether BOS is put in front of it, and with which token a trained turn ends. (At what a server stops:
`pipeline.ollama.parameters`.)
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.prompt.tokenizer import saved_tokenizer


class TemplateRefused(UserError):
    """The template raised: it does not take this conversation. `words` are its own."""

    def __init__(self, words: str, messages: Sequence[Mapping[str, Any]]) -> None:
        roles = ", ".join(str(message.get("role")) for message in messages)
        super().__init__(f"the model's chat template refuses a conversation of ({roles}): {words}")
        self.words = words


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and what it depends on.

    Attributes:
        source: the Jinja text.
        bos_token, eos_token: their texts, "" where there is none.
        adds_bos: whether the tokenizer puts BOS in front of every text by itself (as a server then does).
        special_tokens: texts of all special tokens, those that the template writes first.
        variables: the special tokens that transformers gives the template (bos_token, pad_token, ...); where none are
            known, bos_token and eos_token.
        architecture: the model's, which Ollama looks at too; "" if it is not known.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""
    adds_bos: bool = False
    special_tokens: tuple[str, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict, hash=False)
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
            raise UserError(
                f"{where} has no chat template, which says how a conversation is written: name one in "
                "model.chat_template, or take an instruct model as the base"
            )
        plain = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        return ChatTemplate(
            source,
            plain.get("bos_token", ""),
            plain.get("eos_token", ""),
            adds_bos=adds_bos(tokenizer),
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
        tools: Sequence[Mapping[str, Any]] | None = None,
        think: bool | None = None,
        today: datetime.datetime | None = None,
        *,
        prompt: bool = True,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: {"role", "content"} and what else the template knows.
            tools: JSON schemas of the tools that the model may call.
            think: given to the template as `enable_thinking`, unless None.
            today: the date that the template sees; default: the real one.
            prompt: end with the generation prompt, which makes the model answer; else end as the last message does,
                even if the template would not.

        Raises:
            TemplateRefused: with the template's own words.
            UserError: the template is no valid Jinja.
        """
        text = self._written(messages, tools, think, today, prompt)
        return text if prompt else text.removesuffix(self.unasked_prompt)

    @cached_property
    def unasked_prompt(self) -> str:
        """The generation prompt of a template that writes it after an answer too, whatever it is asked; else "".

        The first template of Llama 3 is one: it ends with <|eot_id|><|start_header_id|>assistant<|end_header_id|>.
        """
        question, answer = ({"role": role, "content": f"Qzx{role}xzQ"} for role in ("user", "assistant"))
        try:
            asked, unasked = (self._written([question], None, None, None, prompt) for prompt in (True, False))
            if asked != unasked:
                return ""
            ended = self._written([question, answer], None, None, None, False)
        except TemplateRefused:
            return ""
        _, found, after = ended.rpartition(answer["content"])
        if not found or self.between_turns().startswith(after.rstrip()):  # so answers end, and nothing follows
            return ""
        ends = [after.index(token) + len(token) for token in self.special_tokens if token and token in after]
        prompt = after[min(ends, default=len(after)) :]
        return prompt if asked.endswith(prompt) else ""

    def _written(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        think: bool | None,
        today: datetime.datetime | None,
        prompt: bool,
    ) -> str:
        """What the template itself writes; arguments as `render` takes them."""
        from jinja2 import TemplateError, TemplateSyntaxError

        names = {**(self.variables or {"bos_token": self.bos_token, "eos_token": self.eos_token})}
        if think is not None:
            names["enable_thinking"] = think
        if today is not None:
            names["strftime_now"] = today.strftime
        plain = [dict(message) for message in messages]
        if not all(type(value) is str for message in plain for value in message.values()):
            plain = json.loads(json.dumps(plain))
        try:
            text: str = _compiled(self.source).render(
                messages=plain,
                tools=[dict(tool) for tool in tools or ()] or None,
                documents=None,
                add_generation_prompt=prompt,
                **names,
            )
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from None
        except TemplateError as error:
            raise TemplateRefused(str(error), messages) from None
        except Exception as error:  # it is somebody's program: it may end in anything
            raise TemplateRefused(f"{type(error).__name__}: {error}", messages) from None
        return text

    def served(self, rendered: str) -> str:
        """What a server has to send for this rendering: without the BOS that the tokenizer will add."""
        return rendered.removeprefix(self.bos_token) if self.adds_bos and self.bos_token else rendered

    def between_turns(self) -> str:
        """The text between an answer and the next question; "" where the template does not show it."""
        answer, question = "QzxAxzQ", "QzxBxzQ"
        turns = [("user", "Hi"), ("assistant", answer), ("user", question)]
        try:
            text = self.render([{"role": role, "content": content} for role, content in turns])
        except TemplateRefused:
            return ""
        _, found, rest = text.partition(answer)
        return rest.partition(question)[0] if found else ""

    def with_source(self, source: str) -> ChatTemplate:
        """The same tokenizer with another template."""
        return replace(self, source=source)


@lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    """A template in the sandbox that transformers renders it in, with what transformers gives it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _compile_jinja_template(source)
    template.globals = dict(template.globals)  # it was a chain of maps, which takes long to copy for every text
    return template


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text of a conversation by a tokenizer's own template: `ChatTemplate.render`.

    Raises:
        TemplateRefused: the template refuses these messages.
        UserError: there is no template.
    """
    # A tokenizer may have several templates, one of them for tools.
    source = tokenizer.get_chat_template(tools=tools) if tokenizer.chat_template else ""
    return _template(tokenizer, source).render(messages, tools, prompt=add_generation_prompt)


@lru_cache(maxsize=8)
def _template(tokenizer: Any, source: str) -> ChatTemplate:
    template = ChatTemplate.from_tokenizer(tokenizer)
    return template if template.source == source else template.with_source(source)


@lru_cache(maxsize=8)
def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts BOS in front of every text by itself, as a server then does."""
    plain, special = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return tokenizer.bos_token_id is not None and special[:1] == [tokenizer.bos_token_id] and special != plain


def with_bos(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Ids with the BOS in front that the tokenizer adds, if the template has not written it."""
    added = adds_bos(tokenizer) and list(ids[:1]) != [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if added else list(ids)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a rendered text as it is trained and served: with one BOS where the tokenizer has it."""
    return with_bos(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of many texts, nothing put in front of them.

    What the tokenizers library, under a fast tokenizer, can tell beside them, `tokenizer(texts)` asks it for: that
    takes half as long again.
    """
    if not tokenizer.is_fast:
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def end_of_turn(tokenizer: Any, text: str) -> str | None:
    """The token that ends a rendered conversation, white space after it aside; None if no token does."""
    written, tokens = text.rstrip(), whole_tokens(tokenizer)
    return next((written[-size:] for size in _sizes(tokens) if written[-size:] in tokens), None)


@lru_cache(maxsize=8)
def _sizes(tokens: frozenset[str]) -> list[int]:
    """The lengths of tokens in characters, the longest first."""
    return sorted({len(token) for token in tokens}, reverse=True)


@lru_cache(maxsize=8)
def whole_tokens(tokenizer: Any) -> frozenset[str]:
    """The tokens that stay whole in any text. Runs of white space are added tokens in some models: not here."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return frozenset(token for token in tokens if token.strip() == token != "")


def in_order(tokens: Iterable[str], source: str) -> tuple[str, ...]:
    """Special tokens, those that a template writes first."""
    return tuple(sorted(tokens, key=lambda token: (token not in source, token)))


def _architecture(config: Path) -> str:
    """What a model's GGUF will name its architecture, as far as Ollama asks for it: there the names are the same."""
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["model_type"]).removesuffix("_text")
    except (OSError, ValueError, KeyError, TypeError):
        return ""

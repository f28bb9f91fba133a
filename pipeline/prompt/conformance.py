"""The conformance suite, put to a server: for every conversation, is the prompt that it sends the one that was trained?

A prompt is compared byte for byte. Some things are no fault of a template, cannot be helped by one, and are named
instead of being called a difference: what the template itself refuses; what the server refuses (tools or thinking for
a model that has none); and what Ollama or llama.cpp does to every conversation before, or besides, any template. For
these the prompt has to be exact once the same is done to what was trained.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import PipelineError
from pipeline.prompt.cases import Case
from pipeline.prompt.message_text import WHITE_SPACE
from pipeline.prompt.plain_jinja import REFUSAL
from pipeline.prompt.template import ChatTemplate, TemplateRefused

EXACT = "exact"
JOINED = "exact, joined"  # Ollama joins neighbours of one role before a Go template sees them
REORDERED = "exact, tool keys reordered"  # Ollama reads tools into structures and writes them out again
UNTRIMMED = "exact, U+00A0 and the like untrimmed"  # llama.cpp's trim knows the white space of ASCII only
DROPPED = "exact, earlier thinking dropped"  # Ollama takes it from every qwen3, before any template
# Reasoning that stands beside the content: Ollama hands it on to no Jinja, and no derived TEMPLATE asks for it.
UNREASONED = "exact, earlier reasoning left out"
NOT_TRAINED = "template refuses"
NOT_SERVED = "server refuses"
TRIMMED = "differs in trimmed white space"  # one of Jinja and server trims messages, the other does not
DIFFERS = "differs"
NOT_SAID = "exact, thinking not said"  # the guard takes a request to think for one that does not say
THINKING = "differs, thinking switched on"  # Ollama asks a model to think unless told not to
NAMED = (JOINED, REORDERED, UNTRIMMED, DROPPED, UNREASONED, NOT_SAID)
COMPARED = (EXACT, *NAMED)
HARMLESS = (*COMPARED, NOT_TRAINED, NOT_SERVED)

Render = Callable[[Case], str]


class RenderRefused(PipelineError):
    """The server's template refused a conversation, as the model's own template may well do too."""


@dataclass(frozen=True)
class Outcome:
    """One conversation's result: its name, one of the words above, both prompts, and the words of a refusal."""

    name: str
    status: str
    expected: str = ""
    served: str = ""
    words: str = ""


@dataclass(frozen=True)
class Report:
    """The results of the whole suite."""

    outcomes: tuple[Outcome, ...]

    @property
    def exact(self) -> bool:
        """Whether no prompt differs and at least one could be compared."""
        return all(outcome.status in HARMLESS for outcome in self.outcomes) and any(
            self.counts[status] for status in COMPARED
        )

    @property
    def counts(self) -> Counter[str]:
        """How many conversations had which outcome."""
        return Counter(outcome.status for outcome in self.outcomes)

    @property
    def summary(self) -> str:
        """One line: "58 exact, 3 template refuses"."""
        return ", ".join(f"{count} {status}" for status, count in self.counts.most_common())

    @property
    def thinking_switched_on(self) -> bool:
        """Whether prompts differ because the server asks the model to think without being asked to."""
        return self.counts[THINKING] > 0

    def first_difference(self) -> Outcome | None:
        """The first conversation that differs, those that differ in more than white space first."""
        for status in (DIFFERS, THINKING, TRIMMED):
            for outcome in self.outcomes:
                if outcome.status == status:
                    return outcome
        return None


def judge(
    template: ChatTemplate,
    suite: Iterable[Case],
    render: Render,
    *,
    joins: bool,
    default_system: str = "",
) -> Report:
    """Put a suite to a server.

    Args:
        template: what was trained.
        suite: the conversations.
        render: asks the server for a conversation's prompt.
        joins: the server joins neighbouring messages of one role, as Ollama does for Go templates.
        default_system: the served model's own system text, which the server puts before a conversation without one.
    """
    return Report(tuple(_outcome(template, conversation, render, joins, default_system) for conversation in suite))


def _outcome(template: ChatTemplate, conversation: Case, render: Render, joins: bool, default_system: str) -> Outcome:
    messages = with_system(conversation.messages, default_system)

    def trained(turns: Sequence[Mapping[str, Any]]) -> str:
        return template.served(template.render(turns, conversation.tools, conversation.think))

    try:
        expected = trained(messages)
    except TemplateRefused as refusal:
        return Outcome(conversation.name, NOT_TRAINED, words=refusal.words)
    try:
        served = render(conversation)
    except RenderRefused as refusal:
        status = NOT_SERVED if _unsupported(str(refusal), conversation) else DIFFERS
        return Outcome(conversation.name, status, expected, words=str(refusal))
    if served == expected:
        return Outcome(conversation.name, EXACT)
    for status, expectation in _explanations(template, conversation, messages, joins):
        try:
            if expectation() == served:
                return Outcome(conversation.name, status, expected, served)
        except TemplateRefused:
            continue
    return Outcome(conversation.name, DIFFERS, expected, served)


def _unsupported(words: str, conversation: Case) -> bool:
    """Whether Ollama itself, or a template of plain conversations, refuses what this conversation asks of the model."""
    if conversation.uses_tools and f"{REFUSAL}tool" in words:
        return True
    match = re.fullmatch(r"\S+ does not support (tools|thinking)", words)
    return match is not None and bool(conversation.tools if match[1] == "tools" else conversation.think)


def _explanations(
    template: ChatTemplate, conversation: Case, messages: Sequence[Mapping[str, Any]], joins: bool
) -> Iterator[tuple[str, Callable[[], str]]]:
    """What a server is known to do, and the prompt that it then has to send."""

    def trained(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], think: bool | None) -> str:
        return template.served(template.render(turns, tools, think))

    think, tools = conversation.think, reordered(conversation.tools)
    meant = joined(messages) if joins else list(messages)
    if meant != messages:
        yield JOINED, lambda: trained(meant, tools, think)
    if tools != list(conversation.tools) or json.dumps(tools) != json.dumps(conversation.tools):
        yield REORDERED, lambda: trained(meant, tools, think)
    if not joins:
        yield UNTRIMMED, lambda: _unhidden(trained(hidden(meant), tools, think))
    if template.architecture == "qwen3" and (rest := dropped(messages)) != messages:
        yield DROPPED, lambda: trained(joined(rest) if joins else rest, tools, think)
    if (rest := unreasoned(meant)) != meant:
        yield UNREASONED, lambda: trained(rest, tools, think)
    if think:
        yield NOT_SAID, lambda: trained(meant, tools, None)
    if think is None:
        yield THINKING, lambda: trained(meant, tools, True)
    yield TRIMMED, lambda: trained(trimmed(meant), tools, think)
    yield TRIMMED, lambda: _unhidden(trained(hidden_ends(meant), tools, think))


# Property names as Ollama's structures have them: what it knows, in its order.
_TOOL = ("type", "items", "function")
_FUNCTION = ("name", "description", "parameters")
_PARAMETERS = ("type", "$defs", "items", "required", "properties")
_PROPERTY = ("anyOf", "type", "items", "description", "enum", "properties", "required")


def reordered(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tools as Ollama hands them on: the keys that it knows, in the order of its own structures."""

    def ordered(values: Any, keys: Sequence[str]) -> dict[str, Any]:
        return {key: values[key] for key in keys if key in values}

    result: list[Mapping[str, Any]] = []
    for tool in tools:
        function = ordered(tool.get("function", {}), _FUNCTION)
        parameters = ordered(function.get("parameters", {}), _PARAMETERS)
        if "properties" in parameters:
            parameters["properties"] = {
                name: ordered(value, _PROPERTY) for name, value in parameters["properties"].items()
            }
        result.append(ordered({**tool, "function": {**function, "parameters": parameters}}, _TOOL))
    return result


# Stand for white space that is not to be trimmed; the unusual is what Python's strip takes away, but not llama.cpp's.
_HIDE = {ord(character): 0xE100 + number for number, character in enumerate(WHITE_SPACE)}
_UNHIDE = {private: character for character, private in _HIDE.items()}
_HIDE_UNUSUAL = {character: private for character, private in _HIDE.items() if chr(character) not in " \t\n\r\v\f"}


def hidden(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with the unusual white space replaced by characters that nothing trims."""
    return [{**message, "content": message["content"].translate(_HIDE_UNUSUAL)} for message in messages]


def hidden_ends(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with the white space around their contents so replaced."""

    def hide(text: str) -> str:
        bare = text.strip()
        before, middle, after = text.partition(bare) if bare else (text, "", "")
        return before.translate(_HIDE) + middle + after.translate(_HIDE)

    return [{**message, "content": hide(message["content"])} for message in messages]


def _unhidden(text: str) -> str:
    return text.translate(_UNHIDE)


def with_system(messages: Sequence[Mapping[str, Any]], system: str) -> list[Mapping[str, Any]]:
    """The messages as Ollama takes them: its model's system text in front, unless the first is a system message."""
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return list(messages)


def joined(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages as a Go template meets them: neighbours of one role as one, with a blank line between."""
    result: list[Mapping[str, Any]] = []
    for message in messages:
        if result and result[-1]["role"] == message["role"] != "tool":
            result[-1] = {**result[-1], "content": f"{result[-1]['content']}\n\n{message['content']}"}
        else:
            result.append(message)
    return result


def dropped(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages as Ollama hands those of a qwen3 on: answers before the last user's turn begin with no thinking.

    The rule is that of `filterThinkTags` in its server/routes.go, and of its thinking/parser.go.
    """

    def rest(text: str) -> str:
        bare = text.lstrip()
        if "<think>".startswith(bare):  # as far as it goes
            return ""
        return bare.partition("</think>")[2].lstrip() if bare.startswith("<think>") else text

    last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=0)
    earlier = [
        {**message, "content": rest(message["content"])} if message["role"] == "assistant" else message
        for message in messages[:last]
    ]
    return [*earlier, *messages[last:]]


def unreasoned(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages as Ollama hands them on: without reasoning beside their contents."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def trimmed(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages without white space around their contents."""
    return [{**message, "content": message["content"].strip()} for message in messages]


_OLLAMA = {"name": "tool_name", "reasoning_content": "thinking"}


def for_ollama(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as Ollama's API spells them."""
    return [{_OLLAMA.get(key, key): value for key, value in message.items()} for message in messages]


def readable_difference(expected: str, served: str, width: int = 400) -> str:
    """A line diff of two prompts, in which every character can be seen."""
    if len(expected) > width or len(served) > width:
        start = max(0, len(os.path.commonprefix([expected, served])) - width // 4)
        expected, served = expected[start : start + width], served[start : start + width]
    lines = difflib.ndiff(_visible(expected), _visible(served))
    return "\n".join(line for line in lines if not line.startswith("?"))


def _visible(text: str) -> list[str]:
    return [repr(line)[1:-1] for line in text.splitlines(keepends=True)]

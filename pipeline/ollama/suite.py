"""The conformance suite, put to a server: for every conversation, is the prompt that it sends the one that was trained?

A prompt is compared byte for byte. Three things are no fault of a template and are named instead: the template itself
refuses the conversation; the server refuses it (it offers no tools or no thinking for this model); or Ollama has joined
neighbouring messages of one role before any Go template saw them, and the prompt is exact for the joined ones.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.chat.conformance import Conversation
from pipeline.ollama.client import RenderRefused
from pipeline.ollama.jinja import ChatTemplate, TemplateRefused

EXACT = "exact"
JOINED = "exact, joined"  # Ollama joins neighbours of one role before a Go template sees them
NOT_TRAINED = "template refuses"
NOT_SERVED = "server refuses"
TRIMMED = "differs in trimmed white space"
DIFFERS = "differs"
HARMLESS = (EXACT, JOINED, NOT_TRAINED, NOT_SERVED)

Render = Callable[[Conversation], str]


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
        return all(outcome.status in HARMLESS for outcome in self.outcomes) and self.counts[EXACT] > 0

    @property
    def only_trimming(self) -> bool:
        """Whether nothing differs but white space that the Jinja trims."""
        return not self.exact and all(outcome.status in (*HARMLESS, TRIMMED) for outcome in self.outcomes)

    @property
    def counts(self) -> Counter[str]:
        """How many conversations had which outcome."""
        return Counter(outcome.status for outcome in self.outcomes)

    @property
    def summary(self) -> str:
        """One line: "58 exact, 3 template refuses"."""
        return ", ".join(f"{count} {status}" for status, count in self.counts.most_common())

    def first_difference(self) -> Outcome | None:
        """The first conversation that differs, those that differ in more than white space first."""
        for status in (DIFFERS, TRIMMED):
            for outcome in self.outcomes:
                if outcome.status == status:
                    return outcome
        return None


def judge(
    template: ChatTemplate,
    suite: Iterable[Conversation],
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
    return Report(
        tuple(_outcome(template, conversation, render, joins, default_system) for conversation in suite)
    )


def _outcome(
    template: ChatTemplate, conversation: Conversation, render: Render, joins: bool, default_system: str
) -> Outcome:
    messages = with_system(conversation.messages, default_system)

    def trained(turns: Sequence[Mapping[str, Any]]) -> str:
        return template.served(template.render(turns, conversation.tools, conversation.think))

    try:
        expected = trained(messages)
    except TemplateRefused as refusal:
        return Outcome(conversation.name, NOT_TRAINED, words=str(refusal))
    try:
        served = render(conversation)
    except RenderRefused as refusal:
        unsupported = "does not support" in str(refusal)
        return Outcome(
            conversation.name, NOT_SERVED if unsupported else DIFFERS, expected, words=str(refusal)
        )
    if served == expected:
        return Outcome(conversation.name, EXACT)
    meant = joined(messages) if joins else list(messages)
    for status, turns in ((JOINED, meant), (TRIMMED, trimmed(meant))):
        try:
            same = turns != list(messages) and _alike(status, trained(turns), served)
        except TemplateRefused:
            continue
        if same:
            return Outcome(conversation.name, status, expected, served)
    return Outcome(conversation.name, DIFFERS, expected, served)


def _alike(status: str, expected: str, served: str) -> bool:
    if status == TRIMMED:
        return "".join(expected.split()) == "".join(served.split())
    return expected == served


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


def trimmed(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages without white space around their contents."""
    return [{**message, "content": message["content"].strip()} for message in messages]


def for_ollama(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as Ollama's API spells them: a tool's name is `tool_name`."""
    return [
        {("tool_name" if key == "name" else key): value for key, value in message.items()}
        for message in messages
    ]


def readable_difference(expected: str, served: str, width: int = 400) -> str:
    """A line diff of two prompts, in which every character can be seen."""
    if len(expected) > width or len(served) > width:
        start = next(
            (i for i, (a, b) in enumerate(zip(expected, served, strict=False)) if a != b),
            min(len(expected), len(served)),
        )
        start = max(0, start - width // 4)
        expected, served = expected[start : start + width], served[start : start + width]
    lines = difflib.ndiff(_visible(expected), _visible(served))
    return "\n".join(line for line in lines if not line.startswith("?"))


def _visible(text: str) -> list[str]:
    return [repr(line)[1:-1] for line in text.splitlines(keepends=True)]

"""What a model is asked: the one rule for all who ask, at every rung, in Ollama and in llama-server.

A question is a row's turns up to its last answer, which is the expected one, with the tools that the row has. Asked are
the rows of the test data; where there are none, `deploy` and `verify` ask those of the validation data, or else of the
training data, and `evaluate`, which counts right answers, asks nothing. Of several adapters that are combined each may
have test rows of its own, and the limit holds for each one's. A whole text asks nothing. Rows with tools are asked only
where a set has no others: servers take calls of tools apart, so that what is answered cannot be compared with what is
expected.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.data.formats import Conversation, Message
from pipeline.data.sources import placed_rows
from pipeline.run.layout import Layout


@dataclass(frozen=True)
class Question:
    """A conversation that ends where the assistant speaks.

    Attributes:
        messages: the turns.
        expected: the text of the answer that the row has.
        tools: JSON schemas of the tools on offer; None for none.
        place: where the row stands, for messages to the user.
        adapter: whose test row it is, of several adapters that are combined; "" where it is asked for all.
    """

    messages: list[Message]
    expected: str = ""
    tools: list[dict[str, Any]] | None = None
    place: str = ""
    adapter: str = ""


def question_of(row: Conversation) -> Question:
    """The question that a conversation ends with."""
    return Question(row.messages[:-1], row.answer, row.tools, row.place)


class MayHaveTools(Protocol):
    """A question, or what stands for one."""

    @property
    def tools(self) -> Any:
        """None or nothing for none."""


Some = TypeVar("Some", bound=MayHaveTools)


def chosen(questions: Iterable[Some], limit: int | None) -> list[Some]:
    """The first questions of a set that are asked: those without tools, or all where every one has tools.

    Args:
        questions: the set; no more of it is read than is needed.
        limit: how many are asked; None for all.
    """
    plain: list[Some] = []
    with_tools: list[Some] = []
    for question in questions:
        kind = with_tools if question.tools else plain
        if len(kind) != limit:
            kind.append(question)
        if len(plain) == limit:
            break
    return plain or with_tools


def asked(data: Path, limit: int | None, sets: Sequence[str] = ("test", "validation", "train")) -> list[Question]:
    """The questions that a run's models are asked.

    Args:
        data: what the data stage left.
        limit: how many; None for all.
        sets: whose questions; the first set that has any is taken.
    """
    whose = data / Layout(data).test_sets.name
    for path in (data / f"{name}.jsonl" for name in sets):
        if path.is_file():
            rows = questions_in(path)
            of_adapters = path.stem == "test" and whose.is_file()
            if questions := _of_each(rows, whose, limit) if of_adapters else chosen(rows, limit):
                return questions
    return []


def _of_each(rows: Iterator[Question], whose: Path, limit: int | None) -> list[Question]:
    """The questions of each adapter, up to the limit; in turn, so that the first ones are of all of them."""
    sizes: dict[str, int] = json.loads(whose.read_text(encoding="utf-8"))
    sets = [
        [replace(question, adapter=name) for question in chosen(list(itertools.islice(rows, size)), limit)]
        for name, size in sizes.items()
    ]
    return [question for turn in itertools.zip_longest(*sets) for question in turn if question is not None]


def questions_in(path: Path) -> Iterator[Question]:
    """The questions of a run's file of conversations."""
    rows = (Conversation.from_row(row, place) for place, row in placed_rows(path))
    return (question_of(row) for row in rows if row.text is None)

"""Which turns of a conversation are trained, by the marks in the data and by `data.train_on`.

A mark is 0 or 1, of a message or of a whole row. A row may also give one for each of its messages:

    {"messages": [question, answer, question, answer], "loss_mask": [0, 0, 0, 1]}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pipeline.data.findings import MarkedRow, RowError
from pipeline.data.names import MARKS, MARKS_OF_NO_TRAINING, MARKS_OF_PARTS

ALL: Literal["all"] = "all"
Trained = tuple[int, ...] | Literal["all"] | None  # places of the messages that are trained; None: every answer
_NAMES = frozenset((*MARKS, *MARKS_OF_NO_TRAINING, *MARKS_OF_PARTS))
_MEANINGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def take_mark(fields: dict[str, Any], place: str) -> bool | None:
    """The mark of a message or a row, whose keys are taken out of the fields; None where there is none.

    Raises:
        RowError: a mark is neither 0 nor 1, is of parts of a text, or contradicts another.
    """
    if _NAMES.isdisjoint(fields):  # as of most
        return None
    found: dict[str, bool] = {}
    for key in (*MARKS, *MARKS_OF_NO_TRAINING):
        if (value := fields.pop(key, None)) is not None and value != "":
            found[key] = _meaning(key, value, place) != (key in MARKS_OF_NO_TRAINING)
    for key in MARKS_OF_PARTS:
        if fields.get(key):
            raise RowError(
                f"{key} cannot be honoured",
                f"{place}: {key} marks parts of a text, and a message is trained whole or not at all: make several "
                f'messages of it, or list "{key}" in data.ignore',
            )
    if len(set(found.values())) > 1:
        marks = ", ".join(f"{key} ({'train' if value else 'do not train'})" for key, value in found.items())
        raise RowError("contradicting marks", f"{place}: its marks contradict each other: {marks}")
    return next(iter(found.values()), None)


def take_list_of_marks(fields: dict[str, Any], messages: int, place: str) -> list[bool] | None:
    """The marks that a row gives for its messages, one for each; None where it has no such list."""
    if _NAMES.isdisjoint(fields):
        return None
    for key in (*MARKS, *MARKS_OF_NO_TRAINING):
        if isinstance(fields.get(key), list):
            values = fields.pop(key)
            if len(values) != messages:
                raise RowError(
                    f"{key} does not fit",
                    f"{place}: {key} has {len(values):,} marks for {messages:,} messages: give one for each",
                )
            return [_meaning(key, value, place) != (key in MARKS_OF_NO_TRAINING) for value in values]
    return None


def _meaning(key: str, value: Any, place: str) -> bool:
    if (
        isinstance(value, bool | int | float | str)
        and (mark := _MEANINGS.get(str(value).strip().casefold())) is not None
    ):
        return mark
    raise RowError(
        f"{key} is neither 0 nor 1",
        f"{place}: {key} = {value!r}: a message is trained or it is not: give 1 or 0",
    )


def trained(roles: Sequence[str], marks: Sequence[bool | None], row: bool | None, train_on: str, place: str) -> Trained:
    """The places of the messages that are trained.

    Args:
        roles: the messages' roles.
        marks: what each message says of itself; None for nothing.
        row: what the row says of all of them.
        train_on: data.train_on: "assistant", "last" or "all".
        place: the row's.

    Raises:
        MarkedRow: none is, since the data says so.
        RowError: a mark asks for what `train_on` does not train.
    """
    if row is False:
        raise MarkedRow(f"{place}: its own mark says that it is not trained")
    if train_on == ALL:
        if False in marks:
            raise RowError(
                'a mark against data.train_on = "all"',
                f'{place}: message {marks.index(False) + 1} is marked as not to be trained, and data.train_on = "all" '
                'trains every token: set it to "assistant"',
            )
        return ALL
    # Nobody asks for an answer that opens a conversation.
    answers = [at for at, role in enumerate(roles) if role == "assistant" and at > 0]
    for at, mark in enumerate(marks):
        if mark and roles[at] != "assistant":
            raise RowError(
                "a mark that is not trained",
                f"{place}: message {at + 1} is the {roles[at]}'s and marked as trained; only the assistant's are (with "
                'data.train_on = "all" every token of every row)',
            )
    chosen = tuple(at for at in (answers[-1:] if train_on == "last" else answers) if marks[at] is not False)
    if answers and not chosen:
        raise MarkedRow(f"{place}: the marks of its messages leave no answer to train")
    return None if list(chosen) == answers else chosen

"""What is wrong with a set as a whole: rows twice, two answers to one question, answers that no metric can judge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from struct import unpack
from typing import NamedTuple

from pipeline.data.formats import Conversation
from pipeline.data.metric import parse_strict
from pipeline.data.places import Places
from pipeline.errors import UserError

_canonical = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode
_DIGEST = 16  # bytes


class Identity(NamedTuple):
    """What of a row says which others it equals, and on which side of a split it lies.

    Attributes:
        question: stands for what is asked, 16 bytes; of a whole text, for all of it.
        answer: stands for the last answer; empty for a whole text, which has none.
        row: stands for all of the row.
        position: where the row lies between 0 and 1, by its group or else its question alone: a share of the rows is
            what lies below it, and a row that is added moves no other.
        drawn: the same by another draw.
    """

    question: bytes
    answer: bytes
    row: bytes
    position: float
    drawn: float


def identity_of(row: Conversation, seed: int) -> Identity:
    """The identity of a row; `seed` draws the positions."""
    asked = _canonical([row.messages[:-1], row.tools] if row.text is None else row.text).encode()
    question = _hash(asked)
    answer = _hash(_canonical(row.messages[-1]).encode()) if row.text is None else b""
    whole = _hash(b"".join((question, answer, repr(row.trained).encode())))
    drawn_by = asked if row.group is None else _canonical(row.group).encode()
    position, drawn = (number / 2**64 for number in unpack(">QQ", _hash(drawn_by, seed)))
    return Identity(question, answer, whole, position, drawn)


def draw(row: Identity, number: int, seed: int) -> bytes:
    """What draws the place of a conversation among all; `number` tells it from others that the row was split into."""
    return _hash(row.row + number.to_bytes(4, "big"), seed)


def _hash(text: bytes, seed: int = 0) -> bytes:
    return hashlib.blake2b(text, digest_size=_DIGEST, salt=seed.to_bytes(16, "big")).digest()


class Seen:
    """The rows of a set that were met so far; of each digests and its place are kept."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}  # numbers among the places
        self._places = Places()
        self._questions: dict[bytes, int] = {}
        self._answers = bytearray()
        self._asked = Places()

    def repeated(self, row: Identity, place: str) -> str | None:
        """Where the same row stood first; None for a new one, which is kept."""
        first = self._rows.setdefault(row.row, len(self._places))
        if first < len(self._places):
            return self._places[first]
        self._places.append(place)
        return None

    def contradicted(self, row: Identity, place: str) -> str | None:
        """Where the same question stood first, if its answer was another one."""
        if not row.answer:
            return None
        first = self._questions.setdefault(row.question, len(self._asked))
        if first == len(self._asked):
            self._asked.append(place)
            self._answers += row.answer
            return None
        answer = self._answers[first * _DIGEST : (first + 1) * _DIGEST]
        return None if answer == row.answer else self._asked[first]


def check_expected(rows: Iterable[Conversation], metric: str) -> None:
    """The test rows' answers can be compared with the metric.

    Raises:
        UserError: an answer is not JSON and eval.metric says it is: no answer could ever be right.
    """
    if metric != "json":
        return
    for row in rows:
        try:
            parse_strict(row.answer)
        except ValueError as error:
            raise UserError(f'{row.place}: eval.metric is "json", but the answer is not strict JSON: {error}') from None

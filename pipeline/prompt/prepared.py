"""All that is worked out of a row by itself, in whatever process: read, checked, told from others, encoded.

What depends on other rows, their order, their repetitions, and on which side of a split they are, is left to whoever
takes the rows one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pipeline.data.checks import Identity, draw, identity_of
from pipeline.data.formats import Conversation, Reading, conversation_of
from pipeline.data.leaks import Asked, Leaks, Near, asked_in
from pipeline.data.near_duplicates import signatures
from pipeline.data.sources import parsed
from pipeline.data.token_file import as_bytes, of_bytes
from pipeline.errors import UserError
from pipeline.prompt.labels import IGNORED, Tokenized, leading_bos
from pipeline.prompt.sequences import Encoder


class Packed(NamedTuple):
    """A sequence as it is written: the bytes of its ids and labels, and what is counted of it."""

    ids: bytes
    labels: bytes
    length: int
    trained: int
    merged: int
    leading_bos: int
    last: int  # the last token that is trained

    def unpacked(self) -> Tokenized:
        """The sequence as lists."""
        return Tokenized(of_bytes(self.ids), of_bytes(self.labels), self.merged)


class Kept(NamedTuple):
    """A conversation that is trained: its line of JSON, what draws its place among the shuffled, its sequences."""

    line: bytes
    draw: bytes
    sequences: list[Packed]


class Encoded(NamedTuple):
    """What is trained of a row.

    Attributes:
        kept: conversations; empty where nothing is.
        error: why it cannot be used, if it cannot.
        notes: what was found or done, as (kind, words).
        left_off: messages after the last trained one.
        opens: whether it begins with an answer, which nobody asks for.
        is_text: whether it is a whole text.
        tools: whether tools are on offer in it, are called, or say something.
    """

    kept: list[Kept]
    error: UserError | None
    notes: list[tuple[str, str]]
    left_off: int
    opens: bool
    is_text: bool
    tools: bool


class Prepared(NamedTuple):
    """A row of a file.

    Attributes:
        place: "file:line", for messages to the user.
        error: why it is no conversation; None for one, which has an identity and a signature.
        identity: which others it equals.
        signature: which others it is near.
        asked: what says whether it leaks, of a held-out row.
        leaks: of every held-out set, which rows it is near.
        encoded: what is trained of it, if that was wanted.
    """

    place: str
    error: UserError | None = None
    identity: Identity | None = None
    signature: bytes = b""
    asked: Asked | None = None
    leaks: tuple[list[Near], ...] = ()
    encoded: Encoded | None = None


class Batch(NamedTuple):
    """Rows as they stand in a file, with their places; `system` is the message for those that have none."""

    rows: list[tuple[str, Any]]
    system: str | None


@dataclass(frozen=True)
class Preparer:
    """Prepares rows.

    Attributes:
        reading: how they are read.
        encoder: makes sequences of them; None where none are wanted.
        seed: of the split, and of the order.
        shuffle: whether what draws their order is wanted.
        held_out: whether they are held out, and what is asked in them is wanted.
        leaks: the held-out sets that they may leak.
    """

    reading: Reading
    encoder: Encoder | None
    seed: int
    shuffle: bool = False
    held_out: bool = False
    leaks: tuple[Leaks, ...] = ()

    def prepare(self, batch: Batch) -> list[Prepared]:
        """The rows of a batch, in their order."""
        reading = replace(self.reading, system=batch.system)
        read: list[Conversation | Prepared] = []
        for place, row in batch.rows:
            try:
                read.append(conversation_of(parsed(row, place), place, reading))
            except UserError as error:
                read.append(Prepared(place, error))
        good = iter(self._prepared([row for row in read if isinstance(row, Conversation)]))
        return [next(good) if isinstance(row, Conversation) else row for row in read]

    def _prepared(self, rows: list[Conversation]) -> list[Prepared]:
        asked = asked_in(rows) if self.held_out or self.leaks else []
        near = [leaks.near(asked) for leaks in self.leaks]
        said = signatures([row.whole for row in rows])
        identities = [identity_of(row, self.seed) for row in rows]
        encoded = self._encoded(rows, identities)
        return [
            Prepared(
                row.place,
                None,
                identities[at],
                said[at],
                asked[at] if self.held_out else None,
                tuple(of_set[at] for of_set in near),
                encoded[at],
            )
            for at, row in enumerate(rows)
        ]

    def _encoded(self, rows: list[Conversation], identities: list[Identity]) -> list[Encoded | None]:
        if self.encoder is None:
            return [None] * len(rows)
        return [
            Encoded(
                [
                    Kept(
                        conversation.as_line().encode(),
                        draw(identity, number, self.seed) if self.shuffle else b"",
                        [self._packed(sequence) for sequence in sequences],
                    )
                    for number, (conversation, sequences) in enumerate(outcome.kept)
                ],
                outcome.error,
                outcome.notes,
                row.cut,
                bool(row.messages) and row.messages[0]["role"] == "assistant",
                row.text is not None,
                bool(row.tools) or any(one["role"] == "tool" or "tool_calls" in one for one in row.messages),
            )
            for row, identity, outcome in zip(rows, identities, self.encoder.encode(rows), strict=True)
        ]

    def _packed(self, sequence: Tokenized) -> Packed:
        assert self.encoder is not None
        return Packed(
            as_bytes(sequence.input_ids),
            as_bytes(sequence.labels),
            len(sequence.input_ids),
            sequence.trained,
            sequence.merged,
            leading_bos(self.encoder.tokenizer, sequence.input_ids),
            next(label for label in reversed(sequence.labels) if label != IGNORED),
        )

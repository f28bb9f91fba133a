"""A set as training reads it: conversations, their token ids and labels, and their figures."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.data.checks import Leaks, digest
from pipeline.data.findings import Findings
from pipeline.data.formats import Conversation
from pipeline.data.sources import file_of
from pipeline.data.token_file import TokenFile, put_in_order
from pipeline.prompt.encoder_pool import EncoderPool
from pipeline.prompt.labels import IGNORED, Tokenized, decode, leading_bos, trained_parts
from pipeline.prompt.sequences import Outcome

# Rows that are tokenized in one call, enough to be quick; fewer where they have so much text, which needs memory.
BATCH, _CHARACTERS = 500, 2_000_000
# Batches encoded while further rows are read: as many whoever encodes them, so that findings come in one order.
_AHEAD = 8
EXAMPLES = 3  # sequences shown in data.json
_BARS = 20  # of the histogram of lengths


class TrainingSet:
    """Takes rows, and writes what is trained of them as they come.

    Args:
        name: the set's.
        rows: the file of the conversations, JSON lines.
        tokens: the file of their sequences, Arrow.
        encoders: make the sequences.
        findings: takes what is wrong with a row, or was done with it.
        leaks: held-out sets that every kept row is compared with.
        shuffle: the seed of the order in which the conversations stand in the end; None for the order in which they
            come. A conversation's place among the others is drawn by what it holds: the same rows stand in the same
            order, whatever files they come from.
    """

    def __init__(
        self,
        name: str,
        rows: Path,
        tokens: Path,
        encoders: EncoderPool,
        findings: Findings,
        leaks: Iterable[Leaks] = (),
        shuffle: int | None = None,
    ) -> None:
        self.name = name
        self._paths, self._shuffle = (rows, tokens), shuffle
        self._order: list[tuple[bytes, int]] = []  # of each conversation what draws its place, and its sequences
        self._rows = rows.open("w", encoding="utf-8", newline="\n")
        self._tokens = TokenFile(tokens)
        self._encoders, self._findings, self._leaks = encoders, findings, tuple(leaks)
        self._waiting: list[Conversation] = []
        self._characters = 0  # in them
        self._begun: deque[Future[list[Outcome]]] = deque()
        self._lengths: Counter[int] = Counter()
        self._ends: set[int] = set()
        self._leading_bos: set[int] = set()
        self._trained = 0
        self.examples: list[dict[str, Any]] = []
        self.sources: dict[str, Counter[str]] = {}
        self.out = 0  # rows of the user's of which something is kept
        self.kept = 0  # conversations: more than rows where one was split
        self.left_off = 0  # messages after the last trained one
        self.merged = 0  # answers whose first token is shared with the prompt
        self.texts = 0  # rows of `out` that are whole texts
        self.openings = 0  # answers that open a conversation, which nobody asks for

    def add(self, row: Conversation) -> None:
        """Take a row."""
        self._waiting.append(row)
        self._characters += row.size
        if len(self._waiting) == BATCH or self._characters > _CHARACTERS:
            self._begin()
            if len(self._begun) > _AHEAD:
                self._write_first()

    def _begin(self) -> None:
        self._begun.append(self._encoders.begin(self._waiting))
        self._waiting, self._characters = [], 0

    def _write_first(self) -> None:
        for outcome in self._encoders.outcomes(self._begun.popleft()):
            self._write(outcome)

    def _write(self, outcome: Outcome) -> None:
        row = outcome.row
        notes = dict(reversed(outcome.notes))  # the first of each kind
        if outcome.error is not None:
            self._findings.error(row.place, outcome.error)
        elif not outcome.kept:
            kind, words = outcome.notes[-1]
            self._findings.leave_out(row.place, kind, words)
            notes.pop(kind)
        for kind, words in notes.items():
            self._findings.note(row.place, kind, words)
        if not outcome.kept:
            return
        self.out += 1
        self.left_off += row.cut
        self.openings += bool(row.messages) and row.messages[0]["role"] == "assistant"
        self.texts += row.text is not None
        for leaks in self._leaks:
            leaks.add(row)
        for conversation, sequences in outcome.kept * row.times:
            self.kept += 1
            if self._shuffle is not None:
                self._order.append((digest(conversation.as_row(), self._shuffle), len(sequences)))
            self._rows.write(conversation.as_line())
            for sequence in sequences:
                self._tokens.add(sequence.input_ids, sequence.labels)
                self._count(row, sequence)
            for sequence in sequences if row.text is None else sequences[-1:]:  # a window of a text ends anywhere
                self._ends.add(next(label for label in reversed(sequence.labels) if label != IGNORED))

    def _count(self, row: Conversation, sequence: Tokenized) -> None:
        tokenizer = self._encoders.encoder.tokenizer
        length, trained = len(sequence.input_ids), sequence.trained
        self._lengths[length] += 1
        self._trained += trained
        self.merged += sequence.merged
        self._leading_bos.add(leading_bos(tokenizer, sequence.input_ids))
        of_source = self.sources.setdefault(file_of(row.place), Counter())
        of_source.update(sequences=1, tokens=length, tokens_trained=trained)
        if len(self.examples) < EXAMPLES:
            text = decode(tokenizer, sequence.input_ids)
            self.examples.append({"text": text, "trained": trained_parts(tokenizer, sequence)})

    def __enter__(self) -> TrainingSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._begin()
            while self._begun:
                self._write_first()
        self._rows.close()
        self._tokens.__exit__(kind, error, trace)
        if error is None and self._shuffle is not None:
            self._put_in_order()

    def _put_in_order(self) -> None:
        rows, tokens = self._paths
        starts = [0, *itertools.accumulate(count for _, count in self._order)]
        order = sorted(range(len(self._order)), key=lambda at: (self._order[at][0], at))
        with rows.open("rb") as file:
            places = [0, *itertools.accumulate(map(len, file))]
            with rows.with_suffix(".shuffled").open("wb") as shuffled:
                for at in order:
                    file.seek(places[at])
                    shuffled.write(file.readline())
        rows.with_suffix(".shuffled").replace(rows)
        put_in_order(tokens, (sequence for at in order for sequence in range(starts[at], starts[at + 1])))

    def figures(self) -> dict[str, Any]:
        """What can be said about the set in numbers. Lengths are in tokens."""
        tokens = sum(length * count for length, count in self._lengths.items())
        sequences = self._lengths.total()
        return {
            "rows": self.kept,
            "texts": self.texts,
            "sequences": sequences,
            "tokens": tokens,
            "tokens_trained": self._trained,
            "share_trained": round(self._trained / tokens, 4) if tokens else 0.0,
            "longest": max(self._lengths, default=0),
            "length_percentiles": {str(p): _at(self._lengths, (sequences - 1) * p // 100) for p in (50, 90, 99)}
            if sequences
            else {},
            "end_of_turn": sorted(decode(self._encoders.encoder.tokenizer, [token]) for token in self._ends),
            "leading_bos": sorted(self._leading_bos),
        }

    def account(self) -> dict[str, Any]:
        """What is too long for a figure: the histogram of lengths, as [longest, how many], and the sources."""
        width = max(1, -(-max(self._lengths, default=0) // _BARS))
        bars = Counter((length - 1) // width for length in self._lengths.elements())
        return {
            "lengths": [[(bar + 1) * width, bars[bar]] for bar in range(max(bars, default=-1) + 1)],
            "sources": {
                name: {**counts, "share_trained": round(counts["tokens_trained"] / counts["tokens"], 4)}
                for name, counts in self.sources.items()
            },
            "examples": self.examples,
        }


def _at(lengths: Counter[int], rank: int) -> int:
    """The length at a rank, from 0, of all lengths in order."""
    for length in sorted(lengths):
        rank -= lengths[length]
        if rank < 0:
            return length
    raise IndexError(rank)

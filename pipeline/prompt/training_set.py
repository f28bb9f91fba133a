"""A set as training reads it: conversations, their token ids and labels, and their figures."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.data.findings import Findings
from pipeline.data.leaks import Leaks
from pipeline.data.sources import file_of
from pipeline.data.token_file import TokenFile, put_in_order
from pipeline.prompt.labels import decode, trained_parts
from pipeline.prompt.prepared import Packed, Prepared

EXAMPLES = 3  # sequences shown in data.json
_BARS = 20  # of the histogram of lengths


class TrainingSet:
    """Takes rows, and writes what is trained of them as they come.

    Args:
        name: the set's.
        rows: the file of the conversations, JSON lines.
        tokens: the file of their sequences, Arrow.
        tokenizer: made the sequences.
        findings: takes what is wrong with a row, or was done with it.
        leaks: held-out sets that every kept row is compared with.
        shuffle: whether the conversations stand in the end in an order that is drawn, instead of that in which they
            come. A conversation's place among the others is drawn by what it holds: the same rows stand in the same
            order, whatever files they come from.
    """

    def __init__(
        self,
        name: str,
        rows: Path,
        tokens: Path,
        tokenizer: Any,
        findings: Findings,
        leaks: Iterable[Leaks] = (),
        *,
        shuffle: bool = False,
    ) -> None:
        self.name = name
        self._paths, self._shuffle = (rows, tokens), shuffle
        self._order: list[tuple[bytes, int]] = []  # of each conversation what draws its place, and its sequences
        self._rows = rows.open("wb")
        self._tokens = TokenFile(tokens)
        self._tokenizer, self._findings, self._leaks = tokenizer, findings, tuple(leaks)
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
        self.with_tools = ""  # the place of the first row with tools
        self.openings = 0  # answers that open a conversation, which nobody asks for

    def add(self, row: Prepared, times: int = 1) -> None:
        """Take a row.

        Args:
            row: an encoded one.
            times: how often it is trained.
        """
        encoded = row.encoded
        assert encoded is not None
        notes = dict(reversed(encoded.notes))  # the first of each kind
        if encoded.error is not None:
            self._findings.error(row.place, encoded.error)
        elif not encoded.kept:
            kind, words = encoded.notes[-1]
            self._findings.leave_out(row.place, kind, words)
            notes.pop(kind)
        for kind, words in notes.items():
            self._findings.note(row.place, kind, words)
        if not encoded.kept:
            return
        self.out += 1
        self.left_off += encoded.left_off
        self.openings += encoded.opens
        self.with_tools = self.with_tools or (row.place if encoded.tools else "")
        self.texts += encoded.is_text
        for leaks, near in zip(self._leaks, row.leaks, strict=bool(self._leaks)):
            leaks.add(row.place, near)
        of_source = self.sources.setdefault(file_of(row.place), Counter())
        for conversation in encoded.kept * times:
            self.kept += 1
            if self._shuffle:
                self._order.append((conversation.draw, len(conversation.sequences)))
            self._rows.write(conversation.line)
            for sequence in conversation.sequences:
                self._tokens.add(sequence.ids, sequence.labels)
                self._count(sequence, of_source)
            # A window of a text ends anywhere.
            self._ends.update(one.last for one in conversation.sequences[-1 if encoded.is_text else 0 :])

    def _count(self, sequence: Packed, of_source: Counter[str]) -> None:
        self._lengths[sequence.length] += 1
        self._trained += sequence.trained
        self.merged += sequence.merged
        self._leading_bos.add(sequence.leading_bos)
        of_source["sequences"] += 1
        of_source["tokens"] += sequence.length
        of_source["tokens_trained"] += sequence.trained
        if len(self.examples) < EXAMPLES:
            whole = sequence.unpacked()
            text = decode(self._tokenizer, whole.input_ids)
            self.examples.append({"text": text, "trained": trained_parts(self._tokenizer, whole)})

    def __enter__(self) -> TrainingSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()
        self._tokens.__exit__(kind, error, trace)
        if error is None and self._shuffle:
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
            "end_of_turn": sorted(decode(self._tokenizer, [token]) for token in self._ends),
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

"""Held-out questions that are in the training data too, literally or nearly.

They are found exactly, not by sampling: two texts whose sets of word pairs have a Jaccard similarity of t must share
one of the int((1 - t) n) + 1 first pairs of either, in any one order of all pairs (prefix filtering; Bayardo, Ma and
Srikant, "Scaling up all pairs similarity search", 2007). With the rarest first, only a few rows are ever compared.

The word pairs of the held-out rows lie in a file that is mapped into memory. What stays of a row is its place, a digest
of its answer, and its rarest pairs.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from pipeline.data.formats import Conversation
from pipeline.data.word_pairs import NEAR, word_pairs

if TYPE_CHECKING:
    import numpy as np

    from pipeline.data.word_pairs import Numbers

_KINDS = 1 << 20  # counts of how often pairs occur; where two pairs share one, both are taken for less rare
_BATCH = 1000  # rows whose rarest pairs are looked for together


@dataclass(frozen=True)
class Leak:
    """A question that is in the training data and in the held-out data. A similarity of 1.0: the same
    words. `same_answer`: the last answers are equal too."""

    train: str
    held_out: str
    similarity: float
    same_answer: bool


class Asked(NamedTuple):
    """What of a row is compared: the word pairs of its question, each once, 8 bytes each; a digest of its answer."""

    pairs: bytes
    answer: bytes


class Near(NamedTuple):
    """That a row asks what a held-out one asks, which is meant by its number."""

    held_out: int
    similarity: float
    same_answer: bool


def asked_in(rows: Sequence[Conversation]) -> list[Asked]:
    """What of rows is compared."""
    import numpy as np

    if not rows:
        return []
    pairs, starts = word_pairs([row.asked for row in rows])
    answers = (hashlib.blake2b(row.answer.strip().encode(), digest_size=8).digest() for row in rows)
    return [Asked(np.unique(of_row).tobytes(), next(answers)) for of_row in np.split(pairs, starts[1:])]


class Leaks:
    """Takes the rows of a held-out set, then those of the training data, and tells which of the first were met."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (it is gone with this object)
        self._ends = array("q", [0])  # in pairs
        self._answers: list[bytes] = []
        self._places: list[str] = []
        self._best: dict[int, tuple[str, Near]] = {}

    def hold_out(self, place: str, asked: Asked) -> None:
        """Take a held-out row."""
        self._file.write(asked.pairs)
        self._ends.append(self._ends[-1] + len(asked.pairs) // 8)
        self._answers.append(asked.answer)
        self._places.append(place)

    def __len__(self) -> int:
        """How many held-out rows have been taken."""
        return len(self._places)

    def ready(self) -> None:
        """All held-out rows have been taken: what `near` looks into is made here, once, and not in every process."""
        _ = self._index

    def near(self, rows: Sequence[Asked]) -> list[list[Near]]:
        """Which held-out rows each row is near; all of these have been taken."""
        import numpy as np

        if not self or not rows:
            return [[] for _ in rows]
        pairs = [np.frombuffer(row.pairs, np.uint64) for row in rows]
        rare, owners = self._rarest(np.concatenate(pairs), np.array([len(of_row) for of_row in pairs]))
        known, held_out = self._index
        first, past = (np.searchsorted(known, rare, side) for side in ("left", "right"))
        sharing: list[set[int]] = [set() for _ in rows]
        for at in np.flatnonzero(first < past):
            sharing[owners[at]].update(held_out[first[at] : past[at]].tolist())
        return [
            list(self._compared(row.answer, set(of_row.tolist()), numbers) if numbers else ())
            for row, of_row, numbers in zip(rows, pairs, sharing, strict=True)
        ]

    def add(self, place: str, near: Iterable[Near]) -> None:
        """Take a training row and the held-out rows that it is near."""
        for one in near:
            if one.held_out not in self._best or one.similarity > self._best[one.held_out][1].similarity:
                self._best[one.held_out] = place, one

    @property
    def found(self) -> list[Leak]:
        """The nearest training row of each, in the order of the held-out rows."""
        return [
            Leak(place, self._places[number], near.similarity, near.same_answer)
            for number, (place, near) in sorted(self._best.items())
        ]

    def _compared(self, answer: bytes, own: set[int], numbers: set[int]) -> Iterator[Near]:
        for number in numbers:
            theirs = self._pairs[self._ends[number] : self._ends[number + 1]]
            shared = len(own.intersection(theirs.tolist()))
            similarity = shared / (len(own) + len(theirs) - shared)
            if similarity >= NEAR:
                yield Near(number, similarity, answer == self._answers[number])

    @cached_property
    def _pairs(self) -> Numbers:
        """The pairs of all held-out rows, mapped."""
        import numpy as np

        return np.memmap(self._file, np.uint64, "r")

    @cached_property
    def _counts(self) -> np.ndarray:
        """How often pairs occur in the held-out rows, those of one remainder together."""
        import numpy as np

        counts = np.zeros(_KINDS, np.int64)
        for start in range(0, len(self._pairs), _KINDS):
            counts += np.bincount(_kind(self._pairs[start : start + _KINDS]), minlength=_KINDS)
        return counts

    @cached_property
    def _index(self) -> tuple[Numbers, np.ndarray]:
        """The rarest pairs of all held-out rows, in order, and the numbers of the rows."""
        import numpy as np

        rare, rows = [], []
        for start in range(0, len(self._places), _BATCH):
            ends = np.array(self._ends[start : start + _BATCH + 1])
            of_batch, owners = self._rarest(self._pairs[ends[0] : ends[-1]], np.diff(ends))
            rare.append(of_batch)
            rows.append((owners + start).astype(np.int32))
        numbers = np.concatenate(rare)
        order = np.argsort(numbers, kind="stable")
        return numbers[order], np.concatenate(rows)[order]

    def _rarest(self, pairs: Numbers, sizes: np.ndarray) -> tuple[Numbers, np.ndarray]:
        """The rarest pairs of rows, and which row each is of.

        Args:
            pairs: of all the rows, one row after the other.
            sizes: how many each row has.
        """
        import numpy as np

        owners = np.repeat(np.arange(len(sizes)), sizes)
        order = np.lexsort((pairs, self._counts[_kind(pairs)], owners))
        # 1e-9: where (1 - NEAR) * n is whole, rounding must not take one off.
        wanted = ((1 - NEAR) * sizes + 1e-9).astype(int) + 1
        rank = np.arange(len(pairs)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        kept = rank < np.repeat(wanted, sizes)
        return pairs[order][kept], owners[kept]


def _kind(pairs: Numbers) -> np.ndarray:
    import numpy as np

    return (pairs * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(44)).astype(np.int64)

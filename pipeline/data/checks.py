"""What is wrong with a data set as a whole: rows twice, two answers to one question, test rows that were trained on.

Near-duplicates are found exactly, not by sampling: two texts whose sets of word pairs have a Jaccard
similarity of t must share one of the ceil((1 - t) n) + 1 rarest pairs of either (prefix filtering; Bayardo,
Ma and Srikant, "Scaling up all pairs similarity search", 2007). So only a few rows are ever compared.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.formats import Conversation
from pipeline.data.metric import parse_strict
from pipeline.errors import UserError

_WORD = re.compile(r"\w+")
NEAR = 0.9  # Jaccard similarity of the word pairs from which two questions are near-duplicates


@dataclass(frozen=True)
class Leak:
    """A question that is in the training data and in the held-out data. A similarity of 1.0: the same
    words. `same_answer`: the last answers are equal too."""

    train: str
    held_out: str
    similarity: float
    same_answer: bool


class Seen:
    """The rows of a set that were met so far; of each a digest and its place is kept."""

    def __init__(self) -> None:
        self._rows: dict[bytes, str] = {}
        self._answers: dict[bytes, tuple[bytes, str]] = {}

    def repeated(self, row: Conversation) -> str | None:
        """Where the same row stood first; None for a new one, which is kept."""
        place = self._rows.setdefault(digest(row.as_row()), row.place)
        return None if place is row.place else place

    def contradicted(self, row: Conversation) -> str | None:
        """Where the same question stood first, if its answer was another one."""
        if row.text is not None:
            return None
        answer = digest(row.messages[-1])
        first, place = self._answers.setdefault(question_digest(row), (answer, row.place))
        return None if first == answer else place


def digest(value: Any, seed: int = 0) -> bytes:
    """16 bytes that stand for a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16, salt=seed.to_bytes(16, "big")).digest()


def question_digest(row: Conversation, seed: int = 0) -> bytes:
    """16 bytes that stand for what is asked: the turns before the last answer, and the tools; or for a whole text."""
    return digest([row.messages[:-1], row.tools] if row.text is None else row.text, seed)


def position(row: Conversation, seed: int) -> float:
    """Where a row stands between 0 and 1, by its group or else its question alone: a share of the rows is what lies
    below it, and a row that is added moves no other."""
    key = question_digest(row, seed) if row.group is None else digest(row.group, seed)
    return int.from_bytes(key[:8], "big") / 2**64


class Leaks:
    """Held-out conversations whose questions are in the training data too, literally or nearly.

    Args:
        held_out: the set that was not to be trained on.
    """

    def __init__(self, held_out: Sequence[Conversation]) -> None:
        self._held_out = held_out
        self._pairs = [word_pairs(row.asked) for row in held_out]
        self._frequency = Counter(itertools.chain.from_iterable(self._pairs))
        self._rare_in: dict[str, list[int]] = defaultdict(list)
        for index, of_row in enumerate(self._pairs):
            for pair in _rarest(of_row, self._frequency):
                self._rare_in[pair].append(index)
        self._best: dict[int, Leak] = {}

    def add(self, row: Conversation) -> None:
        """Look at one training row."""
        if not self._held_out:
            return
        own = word_pairs(row.asked)
        for index in {index for pair in _rarest(own, self._frequency) for index in self._rare_in.get(pair, ())}:
            similarity = len(own & self._pairs[index]) / len(own | self._pairs[index])
            if similarity >= NEAR and (index not in self._best or similarity > self._best[index].similarity):
                other = self._held_out[index]
                same = row.answer.strip() == other.answer.strip()
                self._best[index] = Leak(row.place, other.place, similarity, same)

    @property
    def found(self) -> list[Leak]:
        """The nearest training row of each, in the order of the held-out rows."""
        return [self._best[index] for index in sorted(self._best)]


def find_leaks(train: Iterable[Conversation], held_out: Sequence[Conversation]) -> list[Leak]:
    """All leaks between two sets."""
    leaks = Leaks(held_out)
    for row in train:
        leaks.add(row)
    return leaks.found


def word_pairs(said: str) -> frozenset[str]:
    """Neighbouring words of a text, whatever the case and the punctuation."""
    return frozenset(f"{a} {b}" for a, b in itertools.pairwise(words(said)))


def words(said: str) -> list[str]:
    """The words of a text after an empty one, so that the first has a neighbour; of a text without any, itself."""
    return ["", *(_WORD.findall(said.casefold()) or [said])]


def _rarest(pairs: frozenset[str], frequency: Counter[str]) -> list[str]:
    # 1e-9: where (1 - NEAR) * n is whole, rounding must not take one off.
    count = int((1 - NEAR) * len(pairs) + 1e-9) + 1
    return sorted(pairs, key=lambda pair: (frequency[pair], pair))[:count]


def check_expected(rows: Sequence[Conversation], metric: str) -> None:
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

"""What is wrong with a data set as a whole: rows twice, test rows that were trained on, answers that no metric reads.

Near-duplicates are found exactly, not by sampling: two texts whose sets of word pairs have a Jaccard
similarity of t must share one of the ceil((1 - t) n) + 1 rarest pairs of either (prefix filtering; Bayardo,
Ma and Srikant, "Scaling up all pairs similarity search", 2007). So only a few rows are ever compared.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.formats import Conversation
from pipeline.data.metric import parse_strict
from pipeline.errors import UserError

NEAR = 0.9  # Jaccard similarity of the word pairs from which two questions are near-duplicates


@dataclass(frozen=True)
class Leak:
    """A question that is in the training data and in the held-out data. A similarity of 1.0: the same
    words."""

    train: str
    held_out: str
    similarity: float


def drop_duplicates(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations without exact repetitions; the first of each stays."""
    first: dict[str, Conversation] = {}
    for row in conversations:
        first.setdefault(json.dumps(row.as_row(), sort_keys=True), row)
    return list(first.values())


def find_leaks(train: Sequence[Conversation], held_out: Sequence[Conversation]) -> list[Leak]:
    """Held-out conversations whose questions are in the training data too, literally or nearly."""
    pairs = [_word_pairs(row) for row in held_out]
    frequency = Counter(itertools.chain.from_iterable(pairs))
    rare_in: dict[str, list[int]] = defaultdict(list)
    for index, of_row in enumerate(pairs):
        for pair in _rarest(of_row, frequency):
            rare_in[pair].append(index)

    best: dict[int, Leak] = {}
    for row in train:
        own = _word_pairs(row)
        for index in {index for pair in _rarest(own, frequency) for index in rare_in.get(pair, ())}:
            similarity = len(own & pairs[index]) / len(own | pairs[index])
            if similarity >= NEAR and (index not in best or similarity > best[index].similarity):
                best[index] = Leak(row.place, held_out[index].place, similarity)
    return [best[index] for index in sorted(best)]


def _word_pairs(row: Conversation) -> frozenset[str]:
    """Neighbouring words of what the user says, whatever the case and the punctuation."""
    said = " ".join(message["content"] for message in row.messages if message["role"] == "user")
    words = ["", *re.findall(r"\w+", said.casefold())] if said.strip() else [""]
    return frozenset(f"{a} {b}" for a, b in itertools.pairwise(words)) or frozenset([said])


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
            parse_strict(row.messages[-1]["content"])
        except ValueError as error:
            raise UserError(f'{row.place}: eval.metric is "json", but the answer is not strict JSON: {error}') from None

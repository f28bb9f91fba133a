"""Neighbouring words of texts, whatever the case and the punctuation, as numbers: by them near duplicates are found.

A word is its CRC-32, so a pair has 64 bits: two words in 4,000,000,000 are taken for the same.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.uint64]

NEAR = 0.9  # Jaccard similarity of the word pairs from which two texts are nearly the same
_WORD = re.compile(r"\w+")
_SPACED = "".join(character if _WORD.match(character) else " " for character in map(chr, range(128)))


def words(said: str) -> list[str]:
    """The words of a text after an empty one, so that the first has a neighbour; of a text without any, itself."""
    text = said.casefold()
    found = text.translate(_SPACED).split() if text.isascii() else _WORD.findall(text)  # the first takes half the time
    return ["", *(found or [said])]


def word_pairs(texts: Sequence[str]) -> tuple[Numbers, NDArray[np.int64]]:
    """The pairs of neighbouring words of one text or more.

    Returns:
        The pairs of all texts, one text after the other, as often as they occur; and where each text's begin. None
        is without.
    """
    import numpy as np

    numbers, ends = array("I"), []
    for text in texts:
        numbers.extend(map(_NUMBERS.__getitem__, words(text)))
        ends.append(len(numbers))
    word = np.frombuffer(numbers, np.uintc).astype(np.uint64)
    inside = np.ones(len(word) - 1, bool)
    inside[np.array(ends[:-1], int) - 1] = False  # the last word of a text and the first of the next one
    starts = np.array([0, *ends[:-1]]) - np.arange(len(ends))
    return (word[:-1] << np.uint64(32) | word[1:])[inside], starts


class _Numbers(dict[str, int]):
    """The numbers of words, of so many at the most; a dictionary is asked in half the time that a cache takes."""

    _MOST = 1 << 16

    def __missing__(self, word: str) -> int:
        if len(self) >= self._MOST:
            self.clear()
        self[word] = number = zlib.crc32(word.encode())
        return number


_NUMBERS = _Numbers()

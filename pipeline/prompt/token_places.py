"""The tokens of texts, and where they lie in them.

A tokenizer cuts a text at its added tokens before it does anything else, and what follows one changes nothing before
it. So a text is tokenized in pieces, each an added token with what follows it, and of many texts each different piece
once: the system message that all rows have costs next to nothing. Nor need the tokenizer be asked for the offsets of
these tokens, which take a third of its time. The pieces of a row, two of which every row has:

    "<|im_start|>user\\nHi"  "<|im_end|>\\n"  "<|im_start|>assistant\\nHello"  "<|im_end|>\\n"

Where an added token takes the white space before it, or has to stand alone as a word, it depends on the piece before:
such a tokenizer is given whole texts, and asked for the offsets.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from pipeline.prompt.template import ids_of


class Located:
    """The tokens of a text.

    Args:
        tokenizer: a fast one.
        text: any.
        ids: of its tokens.
        cuts: of every added token its first character, the one past its last, and its place among the ids; None to
            find them by the offsets.
    """

    def __init__(
        self, tokenizer: Any, text: str, ids: list[int], cuts: Sequence[tuple[int, int, int]] | None = None
    ) -> None:
        self.text, self.ids = text, ids
        self._tokenizer = tokenizer
        self._cuts = self._found_cuts() if cuts is None else cuts

    def tail(self, start: int) -> tuple[int, str]:
        """What of a prompt may be tokenized otherwise than in the whole text: it begins with its last added token.

        Args:
            start: the character that the prompt ends before.

        Returns:
            How many of the whole text's tokens stand before it, and the tail.
        """
        for first, past, place in reversed(self._cuts):
            if past <= start:
                return place, self.text[first:start]
        return 0, self.text[:start]

    def ending(self, end: int) -> int:
        """The place of the token that ends before this character, or else goes past it."""
        for _, past, place in reversed(self._cuts):
            if past == end:
                return place
        return bisect_left(self._offsets, end, key=lambda offset: offset[1])

    def beginning(self, start: int) -> int:
        """The place of the first token that begins at this character or after it."""
        return bisect_left(self._offsets, start, key=lambda offset: offset[0])

    @cached_property
    def _offsets(self) -> list[tuple[int, int]]:
        found = self._tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["offset_mapping"])

    def _found_cuts(self) -> list[tuple[int, int, int]]:
        texts = {number: token for token, number in _cutting_tokens(self._tokenizer).items()}
        if texts.keys().isdisjoint(self.ids):
            return []
        return [
            (first, past, at)
            for at, (number, (first, past)) in enumerate(zip(self.ids, self._offsets, strict=True))
            if number in texts and self.text.startswith(texts[number], first)  # else words were joined to it
        ]


def locate(tokenizer: Any, texts: Sequence[str]) -> list[Located]:
    """The tokens of texts, in front of which nothing is put."""
    pattern = _pattern(tokenizer)
    if pattern is None:
        return [Located(tokenizer, text, ids) for text, ids in zip(texts, ids_of(tokenizer, texts), strict=True)]
    spans = [[match.span() for match in pattern.finditer(text)] for text in texts]
    pieces = [_pieces(text, of_text) for text, of_text in zip(texts, spans, strict=True)]
    different = list(dict.fromkeys(itertools.chain.from_iterable(pieces)))
    known = dict(zip(different, ids_of(tokenizer, different), strict=True))
    numbers = _cutting_tokens(tokenizer)
    # The tokenizer sees other tokens in these.
    odd = {piece for piece in known if (at := pattern.match(piece)) and known[piece][:1] != [numbers[at[0]]]}
    return [
        _joined(tokenizer, text, of_text, [known[piece] for piece in parts])
        if odd.isdisjoint(parts)
        else Located(tokenizer, text, ids_of(tokenizer, [text])[0])
        for text, of_text, parts in zip(texts, spans, pieces, strict=True)
    ]


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """What stands before the first added token, and then each with what follows it."""
    ends = [0, *(first for first, _ in spans), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def _joined(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], ids: Sequence[list[int]]) -> Located:
    places = itertools.accumulate(map(len, ids))
    cuts = [(first, past, place) for (first, past), place in zip(spans, places, strict=False)]
    return Located(tokenizer, text, list(itertools.chain.from_iterable(ids)), cuts)


@lru_cache(maxsize=8)
def _cutting_tokens(tokenizer: Any) -> dict[str, int]:
    """The added tokens that are found in a text as it is, whatever stands beside them, and their numbers."""
    return {
        str(token): number
        for number, token in tokenizer.added_tokens_decoder.items()
        if not (token.normalized or token.single_word or token.lstrip)
    }


@lru_cache(maxsize=8)
def _pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds the tokens that cut a text; None where there are none, or some that depend on the piece before."""
    tokens = tokenizer.added_tokens_decoder.values()
    longest_first = sorted(_cutting_tokens(tokenizer), key=len, reverse=True)
    depends = any(token.single_word or token.lstrip for token in tokens)
    return None if depends or not longest_first else re.compile("|".join(map(re.escape, longest_first)))

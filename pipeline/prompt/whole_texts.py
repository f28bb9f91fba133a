"""Whole texts, as continued pretraining has them: every token is trained, and the end token after the last one.

A text that is longer than a window is cut into several. Each begins as a served text does, with BOS where the tokenizer
puts one, and with the last token of the window before it, which is not trained again. So every token of a text is
trained once, with something before it. A text of the tokens a b c d e, in windows of four:

    BOS a b c        (a, b and c are trained)
    BOS c d e        (d and e)
    BOS e EOS        (EOS)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.prompt.labels import IGNORED, Tokenized
from pipeline.prompt.template import ids_of, with_bos


def tokenize_whole_texts(tokenizer: Any, texts: Sequence[str], window: int) -> list[list[Tokenized]]:
    """The sequences of each text.

    Args:
        tokenizer: the one that is trained with.
        texts: none of them empty.
        window: of a sequence, in tokens, 3 or more.

    Raises:
        UserError: the tokenizer names no end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "model.base: a whole text ends with the base's end token, and its tokenizer names none (eos_token)"
        )
    if not texts:
        return []
    ids = ids_of(tokenizer, texts)
    return [list(_windows(tokenizer, [*of_text, tokenizer.eos_token_id], window)) for of_text in ids]


def _windows(tokenizer: Any, ids: list[int], window: int) -> Iterator[Tokenized]:
    start = 0
    while start < len(ids):
        context = ids[start - 1 : start] if start else []
        opening = len(with_bos(tokenizer, [*context, ids[start]])) - 1
        trained = ids[start : start + window - opening]
        sequence = with_bos(tokenizer, [*context, *trained])
        yield Tokenized(sequence, [IGNORED] * (len(sequence) - len(trained)) + trained)
        start += len(trained)

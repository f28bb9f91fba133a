"""Control tokens inside the texts of a row: to the model `<|im_end|>` in a question ends the turn, whoever wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pipeline.data.formats import Conversation


def control_tokens_in(tokenizer: Any, row: Conversation) -> Iterator[tuple[str, str]]:
    """The control tokens that stand in a row's texts.

    Yields:
        Which message it is, "message 1", or "the text", and the token's text.
    """
    if (found := _pattern(tokenizer)) is None:
        return
    for token in found.findall(row.text or ""):
        yield "the text", token
    for number, message in enumerate(row.messages, 1):
        for value in message.values():
            for token in found.findall(value if isinstance(value, str) else str(value)):
                yield f"message {number}", token


@lru_cache(maxsize=8)
def _pattern(tokenizer: Any) -> re.Pattern[str] | None:
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    words = sorted(
        (token for token in tokens if token.strip()), key=len, reverse=True
    )  # the longest match is the token
    return re.compile("|".join(map(re.escape, words))) if words else None

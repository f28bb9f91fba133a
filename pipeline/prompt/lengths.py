"""Rows that are longer than what is trained, and questions that are longer than what the base was made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.data.formats import Conversation
from pipeline.errors import UserError
from pipeline.prompt.labels import IGNORED, Tokenized, tokenize_prompt


def fit(row: Tokenized, max_length: int, on_overlong: str, place: str) -> Tokenized | None:
    """A sequence that is not longer than `max_length` tokens, or None if it is to be dropped.

    Args:
        row: the sequence.
        max_length: in tokens.
        on_overlong: "error", "drop", or "truncate" (cut at the end, the end-of-turn token with it).
        place: where the row stands, for the message.

    Raises:
        UserError: the row is too long and that is an error, or nothing of it would be trained.
    """
    length = len(row.input_ids)
    if length > max_length:
        if on_overlong == "drop":
            return None
        if on_overlong == "error":
            raise UserError(
                f"{place}: has {length:,} tokens, train.max_length is {max_length:,}: raise it, or set "
                'data.on_overlong to "drop" or "truncate"'
            )
        row = Tokenized(row.input_ids[:max_length], row.labels[:max_length], row.merged)
    # The first token is predicted from nothing: a label on it trains nothing.
    if all(label == IGNORED for label in row.labels[1:]):
        why = (
            f"its question alone fills train.max_length = {max_length:,}" if length > max_length else "it has no answer"
        )
        raise UserError(
            f'{place}: no token of it would be trained: {why}; shorten it or set data.on_overlong to "drop"'
        )
    return row


def check_room(tokenizer: Any, rows: Sequence[Conversation], context: int | None) -> None:
    """Every question of the test rows can be asked, and leaves room for an answer.

    Args:
        tokenizer: the one that is trained with.
        rows: each ends in the expected answer.
        context: the tokens that the base was made for, if it says so.

    Raises:
        UserError: a question is too long, or the chat template refuses it.
    """
    for row in rows:
        try:
            length = len(tokenize_prompt(tokenizer, row.messages[:-1]))
        except UserError as error:
            raise UserError(f"{row.place}: {error}") from None
        if context is not None and length >= context:
            raise UserError(
                f"{row.place}: the question has {length:,} tokens, and the base was made for {context:,} with the "
                "answer: shorten it, or leave the row out"
            )

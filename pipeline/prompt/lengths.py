"""Rows that are longer than what is trained, and questions that are longer than what the base was made for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from pipeline.data.findings import RowError
from pipeline.data.formats import Conversation
from pipeline.data.questions import Question
from pipeline.errors import UserError
from pipeline.prompt.labels import IGNORED, Tokenized, tokenize_prompt


def fit(row: Tokenized, max_length: int, on_overlong: str, place: str) -> Tokenized | None:
    """A sequence that is not longer than `max_length` tokens, or None if it is to be dropped.

    Args:
        row: the sequence.
        max_length: in tokens.
        on_overlong: "error", "drop", "truncate" (cut at the end, the end-of-turn token with it), or "split", for which
            a row that is still too long is an error too.
        place: where the row stands, for the message.

    Raises:
        RowError: the row is too long and that is an error, or nothing of it would be trained.
    """
    length = len(row.input_ids)
    if length > max_length:
        if on_overlong == "drop":
            return None
        if on_overlong in ("error", "split"):
            ways = '"drop", "truncate" or "split"' if on_overlong == "error" else '"drop" or "truncate"'
            turn = " in one question and its answer" if on_overlong == "split" else ""
            raise RowError(
                "too long",
                f"{place}: has {length:,} tokens{turn}, train.max_length is {max_length:,}: raise it, or set "
                f"data.on_overlong to {ways}",
            )
        row = Tokenized(row.input_ids[:max_length], row.labels[:max_length], row.merged)
    # The first token is predicted from nothing: a label on it trains nothing.
    if row.trained <= (row.labels[0] != IGNORED):
        why = (
            f"its question alone fills train.max_length = {max_length:,}" if length > max_length else "it has no answer"
        )
        raise RowError(
            "nothing would be trained",
            f'{place}: no token of it would be trained: {why}; shorten it or set data.on_overlong to "drop"',
        )
    return row


def pieces(row: Conversation, fits: Callable[[Conversation], bool]) -> list[Conversation]:
    """A conversation cut between an answer and the next question, each piece with the system message and as long as
    fits.

    Args:
        row: the conversation.
        fits: whether a piece is short enough.

    Returns:
        Pieces of at least one question and its answer, also where that alone is too long. A piece of which nothing is
        trained is left out.
    """
    first = next((at for at, message in enumerate(row.messages) if message["role"] != "system"), 0)
    starts = [first] + [
        at
        for at in range(first + 1, len(row.messages))
        if row.messages[at]["role"] == "user" and row.messages[at - 1]["role"] == "assistant"
    ]
    ends = [*starts[1:], len(row.messages)]
    found: list[Conversation] = []
    begin = 0
    while begin < len(starts):
        end = begin
        while end + 1 < len(starts) and fits(_piece(row, first, starts[begin], ends[end + 1])):
            end += 1
        piece = _piece(row, first, starts[begin], ends[end])
        if piece.trained != ():
            found.append(piece)
        begin = end + 1
    return found


def _piece(row: Conversation, system: int, start: int, end: int) -> Conversation:
    messages = [*row.messages[:system], *row.messages[start:end]]
    trained = row.trained
    if isinstance(trained, tuple):
        trained = tuple(at - start + system for at in trained if start <= at < end)
        messages = messages[: trained[-1] + 1] if trained else messages
    return replace(row, messages=messages, trained=trained)


def question_lengths(tokenizer: Any, questions: Iterable[Question]) -> list[int]:
    """The tokens of every question's prompt.

    Args:
        tokenizer: the one that is trained with.
        questions: what the model will be asked.

    Raises:
        UserError: the chat template refuses one; with its place.
    """
    lengths = []
    for question in questions:
        try:
            lengths.append(len(tokenize_prompt(tokenizer, question.messages, question.tools)))
        except UserError as error:
            raise UserError(f"{question.place}: {error}") from None
    return lengths


def check_room(places: Sequence[str], lengths: Sequence[int], answer: int, room: int, limit: str) -> str:
    """Every question can be asked.

    Args:
        places: of what the model will be asked.
        lengths: the tokens of each question.
        answer: the tokens of the longest answer that is waited for.
        room: the tokens that hold a question and its answer.
        limit: what sets the room, for the message: "the base was made for 2,048".

    Returns:
        What has to be said of the longest question, whose answer may be cut; "" if every answer has its room.

    Raises:
        UserError: a question leaves no room for an answer.
    """
    if not lengths:
        return ""
    for place, length in zip(places, lengths, strict=True):
        if length >= room:
            raise UserError(
                f"{place}: the question has {length:,} tokens, and {limit} tokens with the answer: shorten "
                "it, or leave the row out"
            )
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] + answer <= room:
        return ""
    return (
        f"{places[longest]}: the question has {lengths[longest]:,} tokens, and {limit} tokens with the "
        f"answer: one of more than {room - lengths[longest]:,} is cut, and eval.max_new_tokens is {answer:,}"
    )

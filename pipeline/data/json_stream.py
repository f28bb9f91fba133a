"""The rows of one large JSON value, one after the other: of a list, or of an object whose one value is a list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from pipeline.errors import UserError

PIECE = 1 << 20  # characters read at a time
LONGEST_WORD = 100  # characters: a mistake further from the end of a piece is none of where it was cut
_OF_NUMBERS = ("", *"0123456789.eE+-")
_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()


def elements(file: IO[str], place: str) -> Iterator[Any]:
    """The elements of the list.

    Args:
        file: the text.
        place: its path, for messages.

    Raises:
        UserError: it is not JSON, or an object with more than one list of rows.
    """
    text = _Text(file, place)
    wrapped = text.next() == "{"
    if wrapped:
        text.take("{")
        name = text.value()
        text.take(":")
    yield from _list(text)
    if wrapped:
        if text.next() == ",":
            text.take(",")
            raise UserError(
                f'{place}: has "{text.value()}" beside "{name}"; give a list of rows, or an object with one such '
                "list: each further one in a file of its own"
            )
        text.take("}")
    if text.next():
        text.fail("more follows after the end of the list")


def _list(text: _Text) -> Iterator[Any]:
    text.take("[")
    if text.next() == "]":
        text.take("]")
        return
    while True:
        yield text.value()
        if text.next() == "]":
            text.take("]")
            return
        text.take(",")


class _Text:
    """A text that is read in pieces, and where in it the reader stands."""

    def __init__(self, file: IO[str], place: str) -> None:
        self._file, self._place = file, place
        self._text, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 1

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            start = self._at
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            self._pass(start, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Go past this character, which must come next."""
        if self.next() != character:
            self.fail(f"{character!r} should stand here")
        self._pass(self._at, self._at + 1)
        self._at += 1

    def value(self) -> Any:
        """Go past the next value."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                # A number may go on: "-0" in a piece that ends in "-0.".
                if self._ended or self._text[end : end + 1] not in _OF_NUMBERS:
                    break
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos > len(self._text) - LONGEST_WORD
                if self._ended or not unfinished:
                    self._pass(self._at, error.pos)
                    self.fail(error.msg)
            except (RecursionError, ValueError) as error:
                raise UserError(f"{self._place}:{self._line}: not JSON that can be read: {error}") from None
            self._more()
        self._pass(self._at, end)
        self._at = end
        return value

    def fail(self, words: str) -> None:
        """Raise what is wrong here."""
        where = f"{self._place}:{self._line}" if self._line > 1 else self._place
        raise UserError(f"{where}: not valid JSON at column {self._column}: {words}")

    def _more(self) -> bool:
        """Read on: a piece as long as what is kept, so that a long value is not parsed too often."""
        self._text, self._at = self._text[self._at :], 0
        piece = self._file.read(max(PIECE, len(self._text)))
        self._text += piece
        self._ended = not piece
        return bool(piece)

    def _pass(self, start: int, end: int) -> None:
        feeds = self._text.count("\n", start, end)
        self._line += feeds
        self._column = end - self._text.rindex("\n", start, end) if feeds else self._column + end - start

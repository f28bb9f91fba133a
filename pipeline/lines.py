"""Whole lines of a stream that comes in pieces. Only a line feed ends a line.

Python's own str.splitlines, and httpx's iter_lines with it, also take U+0085, U+2028, a form feed and others for a
line's end. A text that a model writes may hold any of them, and a line of JSON that is cut there is none.
"""

from collections.abc import Iterable, Iterator


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of the stream without their line feeds; what follows the last one is a line too, unless it is empty."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest

"""The places of many rows, "train.jsonl:7": of each a few bytes stay in memory."""

from __future__ import annotations

from array import array


class Places:
    """A list of places: what stands before a place's number is kept once, however many have it."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._known: dict[str, int] = {}
        self._name_of, self._numbers = array("i"), array("q")

    def __len__(self) -> int:
        return len(self._numbers)

    def append(self, place: str) -> None:
        """Add a place."""
        name = place.rstrip("0123456789")
        number = place[len(name) :]
        if not number or number[0] == "0" or len(number) > 18:  # it would not be written again as it was
            name, number = place, "0"
        if (at := self._known.setdefault(name, len(self._names))) == len(self._names):
            self._names.append(name)
        self._name_of.append(at)
        self._numbers.append(int(number))

    def __getitem__(self, at: int) -> str:
        return f"{self._names[self._name_of[at]]}{self._numbers[at] or ''}"

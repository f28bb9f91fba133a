"""What is wrong with single rows: each finding is counted under its kind, and kept with its place.

A row that cannot be used stops the stage, which by then has looked at all the others too, or is skipped and named
(`data.on_error`). So for every set: rows in = rows out + rows named.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import IO, Any

from pipeline.errors import PipelineError, UserError

SHOWN = 20  # places, and kinds, that are shown of each set


class RowError(UserError):
    """What is wrong with one row.

    Args:
        kind: what findings like this one are counted under, e.g. 'unknown key "score"'.
        words: the place, what is wrong, what is right.
    """

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return RowError, (self.kind, str(self))  # it comes from another process


class MarkedRow(RowError):
    """A row whose own marks say that none of it is trained: no mistake, and no row to train on."""

    def __init__(self, words: str) -> None:
        super().__init__("marked as not to be trained", words)

    def __reduce__(self) -> tuple[Any, ...]:
        return MarkedRow, (str(self),)


class Findings:
    """The findings of one set, written to a file as they come.

    Args:
        name: the set: train, validation or test.
        file: takes JSON lines {"set", "place", "kind", "words"}.
    """

    def __init__(self, name: str, file: IO[str]) -> None:
        self.name, self._file = name, file
        self.rows = 0  # read
        self.counts: Counter[str] = Counter()  # of all findings, by kind
        self.errors: Counter[str] = Counter()  # of rows that cannot be used
        self.left_out = 0  # rows that could be used and are not
        self.first: dict[str, str] = {}  # of each kind, in words
        self._places: dict[str, list[str]] = {}

    def error(self, place: str, found: UserError) -> None:
        """A row that cannot be used."""
        kind = found.kind if isinstance(found, RowError) else "cannot be read"
        self.errors[kind] += 1
        self.note(place, kind, str(found))

    def leave_out(self, place: str, kind: str, words: str) -> None:
        """A row that could be used and is left out, for its marks or by a setting."""
        self.left_out += 1
        self.note(place, kind, words)

    def note(self, place: str, kind: str, words: str) -> None:
        """Something that was found in a row, or done with it."""
        self.counts[kind] += 1
        self.first.setdefault(kind, words)
        places = self._places.setdefault(kind, [])
        if len(places) < SHOWN:
            places.append(place)
        line = {"set": self.name, "place": place, "kind": kind, "words": words}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def settle(self, on_error: str, limit: float) -> str:
        """Decide on the rows that cannot be used, when all were read.

        Args:
            on_error: "stop" or "skip".
            limit: the largest share of the rows that may be skipped.

        Returns:
            What was skipped, for a warning; "" for nothing.

        Raises:
            UserError: they end the stage: the first of them, and the counts of all.
        """
        bad = self.errors.total()
        if not bad:
            return ""
        if on_error == "skip" and bad <= limit * self.rows:
            return f"{self.name}: {bad:,} of {self.rows:,} rows were skipped\n{self._shown()}"
        if bad == 1 and on_error == "stop":
            raise UserError(self.first[next(iter(self.errors))])
        advice = 'mend them, or leave them out with data.on_error = "skip"'
        if on_error == "skip":
            advice = f"data.skip_limit lets {limit:.2%} of the rows be skipped: mend them, or raise it"
        raise UserError(f"{self.name}: {bad:,} of {self.rows:,} rows cannot be used\n{self._shown()}\n{advice}")

    def _shown(self) -> str:
        """The first row of each kind in words, and the places of the next ones."""
        lines = []
        for kind, count in self.errors.most_common(SHOWN):
            lines.append(f"  {self.first[kind]}")
            if count > 1:
                places = ", ".join(Path(place).name for place in self._places[kind][1:])
                more = ", ..." if count > SHOWN else ""
                lines.append(f"    {count:,} rows: {kind}; the next: {places}{more}")
        if len(self.errors) > SHOWN:
            lines.append(f"  and {len(self.errors) - SHOWN:,} kinds more")
        return "\n".join(lines)

    def summary(self, out: int) -> dict[str, Any]:
        """The account of the rows, and of every kind of finding its count and the first places.

        Args:
            out: the rows that are kept.
        """
        skipped = self.errors.total()
        if self.rows != out + skipped + self.left_out:
            raise PipelineError(
                f"{self.name}: of {self.rows:,} rows {out:,} are kept, {skipped:,} skipped and {self.left_out:,} left "
                "out: some were lost; this is a fault of the program"
            )
        found = {kind: {"count": count, "places": self._places[kind]} for kind, count in self.counts.most_common()}
        return {"rows": self.rows, "kept": out, "skipped": skipped, "left_out": self.left_out, "findings": found}

"""All leaks between two sets of rows, which the data stage takes one after the other."""

from collections.abc import Sequence

from pipeline.data.formats import Conversation
from pipeline.data.leaks import Leak, Leaks, asked_in


def find_leaks(train: Sequence[Conversation], held_out: Sequence[Conversation]) -> list[Leak]:
    """The nearest training row of each held-out one that has been met."""
    leaks = Leaks()
    for row, asked in zip(held_out, asked_in(held_out), strict=True):
        leaks.hold_out(row.place, asked)
    for row, near in zip(train, leaks.near(asked_in(train)), strict=True):
        leaks.add(row.place, near)
    return leaks.found

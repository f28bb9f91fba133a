"""What a person sees while the program works: short lines on standard error, and one bar with a rate and an estimate.

Standard output is left to results (`--json`, tables), so that it can be piped.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


_stream: IO[str] | None = None
_plain = False
_WIDE = 160  # columns


def write_to(stream: IO[str]) -> None:
    """Use another stream than standard error: a stage's worker keeps the terminal this way."""
    global _stream
    _stream = stream
    console.cache_clear()


def use_plain_text() -> None:
    """Print without rich: set-up may be about to install it, or to replace it."""
    global _plain
    _plain = True


@cache
def console() -> "Console":
    """The one console, on standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False) if _stream is None else Console(file=_stream, highlight=False)


def results() -> "Console":
    """A console on standard output, for tables: wide where there is no terminal, whose edge it would have to keep."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)


def say(text: str) -> None:
    """Print a line. The text is printed as it is: brackets in it are no markup."""
    if _plain:
        print(text, file=_stream or sys.stderr, flush=True)
    else:
        console().print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning."""
    console().print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: float | None, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Show how far a piece of long work has come.

    Args:
        description: what is being done, a few words.
        total: how much there is to do, in `unit`; None when nobody knows.
        unit: the name of what is counted, e.g. "rows" or "steps".

    Yields:
        A function to call with the absolute amount that is done.

    Off a terminal there is no bar, only a line at the end.
    """
    started = time.monotonic()
    done = 0.0

    if console().is_terminal:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=console(), transient=True) as bars:
            task = bars.add_task(description, total=total, amount="")

            def update(amount: float) -> None:
                nonlocal done
                done = amount
                bars.update(task, completed=amount, amount=_amount(amount, total, unit, started))

            yield update
    else:

        def update(amount: float) -> None:
            nonlocal done
            done = amount

        yield update
    amount = f"{_amount(done, total, unit, started)}, " if done else ""
    say(f"  {description}: {amount}{time.monotonic() - started:.1f} s")


def _amount(done: float, total: float | None, unit: str, started: float) -> str:
    of = f"/{total:,.0f}" if total is not None else ""
    rate = done / max(time.monotonic() - started, 1e-9)
    return f"{done:,.0f}{of} {unit} ({rate:,.1f}/s)".replace("  ", " ")

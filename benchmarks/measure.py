"""Measuring programs: time, processor time and peak memory of a child; medians of alternating runs; one table.

The measuring process stays small: Linux counts the memory of the process that starts another into the peak of the
started one, so heavy libraries are imported by children alone.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil

Sample = dict[str, float]  # a column of the table -> its value

SECONDS, CPU, PEAK = "seconds", "CPU seconds", "peak MB"


def child(*arguments: str | Path, together: bool = False) -> Sample:
    """Run a program to its end.

    Args:
        arguments: its command.
        together: count the memory of all its processes at once, looked at twice a second; pages that several of them
            hold count once.

    Returns:
        SECONDS by the clock, CPU seconds of it and of the processes that it waited for, and PEAK, the largest resident
        set (10^6 bytes) that one of these had, or all of them.

    Raises:
        SystemExit: it failed; with the end of what it printed.
    """
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        with _watched(process.pid) if together else nullcontext([0]) as peak:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = output.read().decode("utf-8", "replace")[-2000:]
            raise SystemExit(f"{subprocess.list2cmdline(command)}: exit status {process.returncode}\n{said}")
    unit = 1 if sys.platform == "darwin" else 1024
    peak_bytes = peak[0] if together else usage.ru_maxrss * unit
    return {SECONDS: seconds, CPU: usage.ru_utime + usage.ru_stime, PEAK: peak_bytes / 1e6}


@contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """Look at the memory of a process and all below it; what it gives holds the most that there was, in bytes."""
    peak, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            with suppress(psutil.Error):
                first = psutil.Process(pid)
                peak[0] = max(peak[0], sum(map(_held, [first, *first.children(recursive=True)])))

    watching = threading.Thread(target=look)
    watching.start()
    try:
        yield peak
    finally:
        ended.set()
        watching.join()


def _held(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has ended
        return 0


def one_after_the_other(samples: Sequence[Sample]) -> Sample:
    """What steps cost together: times add up, the highest peak counts."""
    return {key: (max if key == PEAK else sum)(sample[key] for sample in samples) for key in samples[0]}


def medians(count: int, *sides: Callable[[], dict[str, Sample]]) -> dict[str, Sample]:
    """Run all sides in turn, `count` times, so that what slows the machine down slows down all of them.

    Args:
        count: how often each side runs.
        sides: each returns what it measured, by the name of the table's row.

    Returns:
        For each row the median of each column.
    """
    measured: dict[str, list[Sample]] = {}
    for turn in range(count):
        for side in sides:
            for row, sample in side().items():
                measured.setdefault(row, []).append(sample)
        print(f"{turn + 1} of {count} runs done", file=sys.stderr)
    return {
        row: {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
        for row, samples in measured.items()
    }


def table(measured: dict[str, Sample], against: dict[str, str]) -> str:
    """The figures as a Markdown table; a row that is held against another shows its ratio to it: "12.3 (1.05x)".

    Args:
        measured: of `medians`.
        against: row -> the row that is its baseline.
    """
    columns = list(next(iter(measured.values())))
    lines = [f"| | {' | '.join(columns)} | against |", "|---" * (len(columns) + 2) + "|"]
    for row, sample in measured.items():
        baseline = measured.get(against.get(row, ""))
        cells = [
            _number(value) + (f" ({value / baseline[key]:.2f}x)" if baseline else "") for key, value in sample.items()
        ]
        lines.append(f"| {row} | {' | '.join(cells)} | {against.get(row, '')} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""The data stage against a plain load and tokenize with the datasets library: `python -m benchmarks.data`.

The stage also checks every row, looks for duplicates and near duplicates, and labels what is trained; the plain load
does none of that. Rows of about 440 bytes are made for it, by a seed.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import Sample, child, medians, table
from benchmarks.program import COMMAND, project

SYLLABLES = ("al", "be", "co", "da", "en", "fo", "gi", "ho", "in", "ju", "ma", "ne", "pi", "ro", "su", "ta", "ve", "wi")


def conversations(count: int) -> Iterator[dict[str, Any]]:
    """Rows of two turns, 70 words together, each different."""
    chance = random.Random(0)
    words = [first + second for first in SYLLABLES for second in SYLLABLES]
    for number in range(count):
        question, answer = (" ".join(chance.choices(words, k=length)) for length in (30, 40))
        turns = (("user", f"{number} {question}"), ("assistant", answer))
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


@click.command()
@click.option("--base", default="smollm2-135m-instruct", show_default=True, help="A packaged base, or a folder.")
@click.option("--rows", "sizes", type=int, multiple=True, default=(10_000, 100_000), show_default=True, help="Rows.")
@click.option("--count", default=1, show_default=True, help="How often each side is run.")
def main(base: str, sizes: tuple[int, ...], count: int) -> None:
    """Measure the time of the command and the memory of all its processes, for each number of rows."""
    from pipeline.model.base import resolve_base

    measured: dict[str, Sample] = {}
    against = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        for size in sizes:
            folder = Path(name) / str(size)
            config = project(folder, base, ())
            with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in conversations(size))
            bare, program = f"datasets, {size:,} rows", f"pipeline data, {size:,} rows"

            def plain(folder: Path = folder, row: str = bare) -> dict[str, Sample]:
                with tempfile.TemporaryDirectory(dir=folder) as cache:
                    arguments = (str(resolve_base(base)), folder / "train.jsonl", cache)
                    return {row: child(sys.executable, "-m", "benchmarks.bare_data", *arguments, together=True)}

            def checked(config: Path = config, row: str = program) -> dict[str, Sample]:
                options = ("--force", "--set", "train.max_length=1024")
                return {row: child(*COMMAND, "data", config, *options, together=True)}

            measured |= medians(count, plain, checked)
            against[program] = bare
    print(table(measured, against))


if __name__ == "__main__":
    main()

"""The train stage against a bare Unsloth and TRL script at equal settings: `python -m benchmarks.train`.

Both train the example's first rows on the packaged base, once: the same tokens, batch, steps and optimizer. The script
is what one writes by hand, so the trainer batches as Unsloth likes best, keeps no checkpoints and records nothing.
Tokens are those of the rows, without padding. `--mixed` makes rows of lengths as different as those of a chat: without
a GPU the script's random batches are then mostly padding.
"""

import itertools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import Sample, child, medians, table
from benchmarks.program import COMMAND, HOME, project, recorded, run_of, settings
from pipeline.data.token_file import token_count

SPEED = "useful tokens/s"
TURNS = (1, 1, 2, 2, 4, 8, 16)  # of a mixed row, in the example's questions with their answers
BARE, PROGRAM = "bare script", "pipeline train"


@click.command()
@click.option("--base", default="smollm2-135m-instruct", show_default=True, help="A packaged base, or a folder.")
@click.option("--steps", default=8, show_default=True, help="Optimizer steps.")
@click.option("--batch", default=8, show_default=True, help="Rows a step.")
@click.option("--count", default=3, show_default=True, help="How often each side is run.")
@click.option("--mixed", is_flag=True, help="Rows of one to sixteen turns.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Another setting, for both sides.")
def main(base: str, steps: int, batch: int, count: int, mixed: bool, overrides: tuple[str, ...]) -> None:
    """Measure tokens per second of the training loop, and what the whole process costs."""
    rows_of_text = _rows(steps * batch, mixed=mixed)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        config = project(folder / "project", base, rows_of_text)
        options = settings([f"train.steps={steps}", f"train.batch={batch}", "train.accumulation=1", *overrides])
        child(*COMMAND, "data", config, *options)
        rows = run_of(config).tokens("train")
        tokens = token_count(rows)
        given = folder / "settings.json"
        given.write_text(json.dumps(_given(base, rows, config, options, folder)), encoding="utf-8")

        def bare() -> dict[str, Sample]:
            whole = child(sys.executable, "-m", "benchmarks.bare_train", given)
            seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
            return {BARE: {SPEED: tokens / seconds} | whole}

        def program() -> dict[str, Sample]:
            whole = child(*COMMAND, "train", config, "--force", *options)
            seconds = recorded(config, "train")["figures"]["seconds_per_step"] * steps
            return {PROGRAM: {SPEED: tokens / seconds} | whole}

        measured = medians(count, bare, program)
    print(table(measured, {PROGRAM: BARE}))


def _rows(count: int, *, mixed: bool) -> list[dict[str, Any]]:
    """The example's first rows; mixed, each is the turns of so many of them as a seeded draw says."""
    lines = map(json.loads, (HOME / "train.jsonl").read_text(encoding="utf-8").splitlines())
    turns = random.Random(0).choices(TURNS, k=count) if mixed else [1] * count
    rows = [list(itertools.islice(lines, number)) for number in turns]
    if len(rows[-1]) < turns[-1]:
        raise click.UsageError(f"the example has fewer than {sum(turns):,} rows")
    return [{"messages": [message for row in several for message in row["messages"]]} for several in rows]


def _given(base: str, rows: Path, config: Path, options: list[str], folder: Path) -> dict[str, Any]:
    """What the bare script is told: the settings that the program would use."""
    from pipeline.model.base import resolve_base

    shown = subprocess.run([*COMMAND, "config", config, "--json", *options], stdout=subprocess.PIPE, check=True).stdout
    result = folder / "seconds.json"
    return {"base": str(resolve_base(base)), "rows": str(rows), "result": str(result)} | json.loads(shown)


if __name__ == "__main__":
    main()

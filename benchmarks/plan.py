"""What `pipeline plan` counts for the training's memory against the peak of real runs: `python -m benchmarks.plan`.

Each run trains a random Llama of another size for two steps: other ranks, lengths, batches and vocabularies, in 4 and
in 16 bits. Without a GPU the peak is the resident set of the stage's process; on one what torch allocated.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.measure import child
from benchmarks.program import COMMAND, project, recorded, settings

STEPS = 2


class Case(NamedTuple):
    """A training: the base's weights, whose tokenizer it has, bits, rank, tokens of a row, rows of a batch."""

    parameters: float
    tokenizer: str
    bits: int
    rank: int
    length: int
    batch: int
    checkpointing: bool = False

    @property
    def base(self) -> str:
        """What the model's folder is called."""
        return f"{self.parameters:g}-{self.tokenizer}"

    def __str__(self) -> str:
        rows = f"{self.batch} x {self.length} tokens"
        checkpointed = ", checkpointing" if self.checkpointing else ""
        return f"{self.parameters / 1e9:g}e9 {self.tokenizer}, {self.bits} bits, rank {self.rank}, {rows}{checkpointed}"


SMALL, LARGE = "smollm2-135m-instruct", "llama3_1"  # vocabularies of 49,000 and 128,000
CASES = (
    Case(0.03e9, SMALL, 4, 16, 128, 2), Case(0.03e9, SMALL, 16, 16, 512, 2), Case(0.03e9, SMALL, 4, 64, 1024, 4),
    Case(0.1e9, SMALL, 4, 16, 128, 1), Case(0.1e9, SMALL, 16, 16, 512, 2), Case(0.1e9, SMALL, 4, 128, 512, 2),
    Case(0.1e9, SMALL, 4, 16, 1024, 2), Case(0.1e9, LARGE, 4, 16, 256, 2), Case(0.1e9, LARGE, 16, 32, 512, 4),
    Case(0.3e9, SMALL, 4, 16, 128, 1), Case(0.3e9, SMALL, 16, 64, 256, 2), Case(0.3e9, LARGE, 4, 16, 512, 1),
    Case(0.6e9, SMALL, 4, 16, 128, 2), Case(0.6e9, SMALL, 16, 16, 256, 1),
    Case(0.1e9, SMALL, 4, 16, 1024, 2, True), Case(0.3e9, LARGE, 16, 32, 512, 2, True),
)  # fmt: skip


@click.command()
@click.option("--largest", default=1e9, show_default=True, help="The weights of the largest base.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Another setting, for every run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, each with the parts of what was counted.")
def main(largest: float, overrides: Sequence[str], as_json: bool) -> None:
    """Show for every run what was counted, what it took, and the error."""
    errors = []
    if not as_json:
        print("| run | counted MB | measured MB | error |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        for case in CASES:
            if case.parameters > largest:
                continue
            counted, measured = _run(case, Path(name), overrides)
            errors.append(counted["needed"] / measured - 1)
            if as_json:
                print(json.dumps({**case._asdict(), **counted, "measured": measured}), flush=True)
            else:
                sizes = f"{counted['needed'] / 1e6:,.0f} | {measured / 1e6:,.0f}"
                print(f"| {case} | {sizes} | {errors[-1]:+.1%} |", flush=True)
    mean = sum(map(abs, errors)) / len(errors)
    print(f"{len(errors)} runs: {mean:.1%} on average, {max(map(abs, errors)):.1%} at worst", file=sys.stderr)


def _run(case: Case, folder: Path, overrides: Sequence[str]) -> tuple[dict[str, int], int]:
    """The parts of what is counted, with their sum as "needed", and what was measured, in bytes."""
    base = folder / case.base
    if not base.is_dir():
        arguments = ("--parameters", str(case.parameters), "--tokenizer", case.tokenizer)
        child(sys.executable, "-m", "benchmarks.random_model", base, *arguments)
    config = project(folder / "project", str(base), list(_rows(case)))
    given = (
        *(f"train.steps={STEPS}", f"train.batch={case.batch}", "train.accumulation=1", f"lora.r={case.rank}"),
        *(f"train.load_in_4bit={json.dumps(case.bits == 4)}", f"train.max_length={case.length}"),
        f"train.gradient_checkpointing={json.dumps(case.checkpointing)}",
        # vicuna needs no token that a base may lack.
        *('data.on_overlong="truncate"', 'model.chat_template="vicuna"', *overrides),
    )
    options = settings(given)
    child(*COMMAND, "data", config, "--force", *options)
    shown = subprocess.run([*COMMAND, "plan", config, "--json", *options], stdout=subprocess.PIPE, check=False).stdout
    plan = json.loads(shown)
    train = next(row for row in plan["stages"] if row["stage"] == "train")
    child(*COMMAND, "train", config, "--force", *options)
    record = recorded(config, "train")
    on_gpu = record["figures"].get("peak_gpu_bytes")
    counted: dict[str, int] = plan["training"] | {"needed": train["gpu"] or train["memory"]}
    # What is free beside the training on a card is not its own; in memory, files that are mapped are resident too.
    counted["needed"] += counted["mapped"] if on_gpu is None else -counted["beside"]
    return counted, on_gpu or record["peak_memory_bytes"]


def _rows(case: Case) -> Iterator[dict[str, Any]]:
    """Rows that are longer than a row may be, and are cut to just that length."""
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for number in range(STEPS * case.batch):
        answer = " ".join("".join(chance.choices(letters, k=6)) for _ in range(case.length))
        yield {"messages": [{"role": "user", "content": str(number)}, {"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    main()

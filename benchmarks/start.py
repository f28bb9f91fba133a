"""How long the command line takes to start, against a Python that imports click: `python -m benchmarks.start`."""

import sys
from pathlib import Path

import click

from benchmarks.measure import Sample, child, medians, table
from benchmarks.program import COMMAND, HOME

BASELINE = "python -c 'import click'"


@click.command()
@click.argument("config", type=click.Path(path_type=Path, exists=True), default=HOME / "pipeline.toml")
@click.option("--count", default=15, show_default=True, help="How often each command is run.")
def main(config: Path, count: int) -> None:
    """Measure `pipeline --help` and `pipeline config CONFIG`."""
    commands: dict[str, tuple[str | Path, ...]] = {
        BASELINE: (sys.executable, "-c", "import click"),
        "pipeline --help": (*COMMAND, "--help"),
        "pipeline config": (*COMMAND, "config", config),
    }

    def all_of_them() -> dict[str, Sample]:
        return {row: child(*command) for row, command in commands.items()}

    all_of_them()  # what is on the disk is in the memory from now on
    print(table(medians(count, all_of_them), dict.fromkeys([*commands][1:], BASELINE)))


if __name__ == "__main__":
    main()

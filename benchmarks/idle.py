"""What a run costs that has nothing to do, against a Python that imports click: `python -m benchmarks.idle`.

Every stage is up to date, so all that is left is to say so: settings, code and files are compared with the manifest.
"""

import subprocess
import sys
from pathlib import Path

import click

from benchmarks.measure import Sample, child, medians, table
from benchmarks.program import COMMAND, HOME

BASELINE = "python -c 'import click'"


@click.command()
@click.argument("config", type=click.Path(path_type=Path, exists=True), default=HOME / "pipeline.toml")
@click.option("--command", default="run", show_default=True, help="run, or a stage and all that it needs.")
@click.option("--count", default=9, show_default=True, help="How often each command is run.")
def main(config: Path, command: str, count: int) -> None:
    """Measure `pipeline run CONFIG` with every stage skipped. A run that is not finished is finished first."""
    row = f"pipeline {command}"

    def both() -> dict[str, Sample]:
        return {BASELINE: child(sys.executable, "-c", "import click"), row: child(*COMMAND, command, config)}

    both()
    before = _status(config)
    text = table(medians(count, both), {row: BASELINE})
    if _status(config) != before:
        raise SystemExit(f"{config}: a stage ran again, so this was no idle run: see `pipeline status {config}`")
    print(text)


def _status(config: Path) -> bytes:
    """The times and figures of all stages: others if one of them has run again."""
    return subprocess.run([*COMMAND, "status", config, "--json"], stdout=subprocess.PIPE, check=True).stdout


if __name__ == "__main__":
    main()

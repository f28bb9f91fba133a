"""The program that is measured, driven by its command line: its command, a small project, what its manifest says."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import CPU, PEAK, SECONDS, Sample
from pipeline.config import Run
from pipeline.run.folder import read_manifest
from pipeline.run.layout import Layout

COMMAND = (sys.executable, "-m", "pipeline")
HOME = Path(__file__).parents[1] / "examples" / "home"


def project(folder: Path, base: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write a configuration with its rows, none of them held out; return the configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    config = folder / "pipeline.toml"
    config.write_text(
        f'[model]\nbase = {json.dumps(base)}\n[data]\ntrain = "train.jsonl"\nvalidation_fraction = 0\n',
        encoding="utf-8",
    )
    return config


def settings(overrides: Sequence[str]) -> list[str]:
    """Overrides as options of a command."""
    return [word for override in overrides for word in ("--set", override)]


def run_of(config: Path) -> Layout:
    """Where the run of a project keeps what, with the default of `run.folder`."""
    return Layout(config.parent / Run().folder)


def recorded(config: Path, stage: str) -> dict[str, Any]:
    """What the manifest of a project's run has for a stage."""
    record: dict[str, Any] = read_manifest(run_of(config).run)["stages"][stage]
    return record


def sample_of(record: dict[str, Any]) -> Sample:
    """What a stage's own process cost."""
    return {SECONDS: record["seconds"], CPU: record["cpu_seconds"], PEAK: record["peak_memory_bytes"] / 1e6}

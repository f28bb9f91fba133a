"""What a stage is handed: its configuration, what earlier stages left, and a place to write.

A stage knows nothing of fingerprints, skipping, renaming or the manifest. It reads `work.folder(...)`, writes below
`work.output`, and returns its figures; `pipeline.run.graph` does the rest for all stages alike.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import console

if TYPE_CHECKING:
    from pipeline.config import Config


@dataclass(frozen=True)
class Work:
    """One stage's task.

    Attributes:
        config: the resolved configuration.
        run: the run's folder.
        output: an empty folder (or, for a stage that resumes, the one that an interrupted process left); it becomes
            `run/<stage>` or `run/<stage>/<variant>` when the stage returns.
        variant: which of the stage's variants this is, "" for a stage that has none.
        scratch: a folder for what is needed only until the stage is done, e.g. checkpoints; it outlives a crash.
        stage: the stage's name.
    """

    config: "Config"
    run: Path
    output: Path
    variant: str = ""
    scratch: Path = Path()
    stage: str = ""
    warnings: list[str] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)

    def folder(self, stage: str, variant: str = "") -> Path:
        """Where an earlier stage left its outputs."""
        return self.run / stage / variant

    def warn(self, message: str) -> None:
        """Show a warning and keep it in the manifest."""
        console.warn(message)
        self.warnings.append(message)
        self.event("warning", message=message)

    def command(self, arguments: Sequence[str | Path]) -> None:
        """Keep a command line in the manifest."""
        self.commands.append([str(argument) for argument in arguments])

    def event(self, kind: str, **fields: Any) -> None:
        """Append a line to the run's events.jsonl."""
        name = f"{self.stage}/{self.variant}" if self.variant else self.stage
        append_event(self.run, kind, stage=name, **fields)


def append_event(run: Path, kind: str, **fields: Any) -> None:
    """Append one JSON line to `run/events.jsonl`: the time in seconds since 1970, the kind, the fields."""
    line = json.dumps({"time": round(time.time(), 3), "kind": kind, **fields}, ensure_ascii=False, default=str)
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")

"""What a stage is, and what it is handed: its settings, what earlier stages left, and a place to write.

A stage is a function and its declaration, a `Stage`, which stand in one file. It knows nothing of fingerprints,
skipping, renaming or the manifest: it reads what its `Task` gives, writes below `task.output`, and returns its figures.
`pipeline.run.graph` does the rest for all stages alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import console
from pipeline.run.layout import Layout
from pipeline.run.view import Names, View

if TYPE_CHECKING:
    from pipeline.config import Config

# In a stage's needs: every stage before it that `verify` judges.
EVERY_JUDGED_STAGE = "every judged stage"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage's declaration: what it does, what it may read, and what makes its result stale.

    Attributes:
        name: the name of its command, and of its folder in the run.
        summary: what it does, in one sentence, for the help page.
        run: does it. Takes the task, returns the figures for the manifest.
        needs: the stages whose outputs it reads: "merge", one variant of a stage ("quantize/q4_k_m"), or
            EVERY_JUDGED_STAGE; or a function of the variant.
        reads: for a stage whose files it does not read all, patterns of those that it does, from that stage's folder
            ("adapter/*"; "!adapter/README.md" takes one away again).
        settings: the keys ("train.seed") and sections ("lora") of the configuration that it reads; another value of one
            makes it stale. Or a function of the variant.
        indifferent_to: keys and sections that it may read too, though another value is no reason to run it again.
        files: files from outside the run that it reads, of a configuration and a variant.
        libraries: the Python packages, by their names in an index, whose versions can change its result.
        begins_with: those of them that its process begins with, where it seldom needs the others.
        programs: what it starts beside Python: the names of pins in third_party/pins.toml.
        goes_on: whether one that was interrupted goes on from what it left in its scratch folder; else that is emptied.
        imports_first: whether its process has imported nothing before: for a library that patches others.
        removes: of a configuration, files of a stage that it needs, by patterns from that stage's folder, which are
            removed when it is done: it has proven them superfluous, and later stages do without. They are made again
            when it has to run again, and for no other reason.
        variants: the names of its variants under a configuration; one that has no name where it has none.
        figures: the most telling of its figures, for the tables.
        judged: whether `verify` judges what it leaves.
        unfinished: why it has to be tried again although nothing has changed, of its figures; else None.
        smaller: what makes it need less memory, as advice after that ran out.
    """

    name: str
    summary: str
    run: Callable[[Task], dict[str, Any]]
    needs: Names | Callable[[str], Names] = ()
    reads: Mapping[str, Names] = field(default_factory=dict)
    settings: Names | Callable[[str], Names] = ()
    indifferent_to: Names = ()
    files: Callable[[Config, str], Iterable[Path]] = lambda config, variant: ()
    libraries: Names = ()
    begins_with: Names | None = None
    programs: Names = ()
    goes_on: bool = False
    imports_first: bool = False
    removes: Callable[[Config], Mapping[str, Names]] = lambda config: {}
    variants: Callable[[Config], Names] = lambda config: ("",)
    figures: Names = ()
    judged: bool = False
    unfinished: Callable[[dict[str, Any]], str | None] = lambda figures: None
    smaller: str = "take a smaller base or a machine with more memory"

    def needs_of(self, variant: str) -> Names:
        """What one variant needs."""
        return self.needs(variant) if callable(self.needs) else self.needs

    def settings_of(self, variant: str) -> Names:
        """What one variant reads of the configuration and is made stale by."""
        return self.settings(variant) if callable(self.settings) else self.settings


@dataclass(frozen=True)
class Task:
    """One stage's task.

    Attributes:
        stage: its declaration.
        config: the configuration, of which only what is declared can be read (`pipeline.run.view`).
        run: the run's folder.
        output: an empty folder; it becomes `run/<stage>` or `run/<stage>/<variant>` when the stage returns.
        variant: which of the stage's variants this is, "" for a stage that has none.
        scratch: a folder for what is needed only until the stage is done, e.g. checkpoints; it outlives a crash of a
            stage that goes on from there, and is empty for every other.
    """

    stage: Stage
    config: Config
    run: Path
    output: Path
    variant: str = ""
    scratch: Path = Path()
    warnings: list[str] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        allowed = (*self.stage.settings_of(self.variant), *self.stage.indifferent_to)
        object.__setattr__(self, "config", View(self.config, allowed, self.stage.name))

    @property
    def layout(self) -> Layout:
        """Where earlier stages left their outputs."""
        return Layout(self.run)

    def new(self, path: Path) -> Path:
        """Where to write now what will be at `path`, one of the layout's for this stage, when the stage is done."""
        return self.output / path.relative_to(self.layout.node(self.stage.name, self.variant))

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
        name = f"{self.stage.name}/{self.variant}" if self.variant else self.stage.name
        append_event(self.run, kind, stage=name, **fields)


def append_event(run: Path, kind: str, **fields: Any) -> None:
    """Append one JSON line to `run/events.jsonl`: the time in seconds since 1970, the kind, the fields."""
    line = json.dumps({"time": round(time.time(), 3), "kind": kind, **fields}, ensure_ascii=False, default=str)
    with Layout(run).events.open("a", encoding="utf-8") as file:
        file.write(line + "\n")

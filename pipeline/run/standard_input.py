"""Data on standard input, `data.train = "-"`: it can be read once, and a run looks at its data again and again.

So the command that starts stages reads it before anything else, as a stream and as it comes, into a file of the run's
folder. That file is the data from then on: other rows on a later run's standard input take its place, and the data
stage is stale as after any change of a file.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path
from typing import IO, Any

from pipeline.config import STANDARD_INPUT, Config
from pipeline.console import say
from pipeline.data.sources import KINDS, named_by_content
from pipeline.errors import UserError
from pipeline.run.folder import locked
from pipeline.run.layout import Layout


def with_standard_input(config: Config, *, read: bool) -> Config:
    """The configuration with the kept file in the place of "-".

    Args:
        config: as it was loaded.
        read: keep what is piped into this command, if anything is.

    Raises:
        UserError: nothing is piped and nothing was kept before, or what came is of no known kind.
    """
    data = config.data
    given = (data.train, data.validation, data.test, *(source.path for source in data.sources))
    if STANDARD_INPUT not in given:
        return config
    if read and _piped(sys.stdin):
        say("reading standard input, to its end")
        with locked(config.run_folder):
            _keep(sys.stdin.buffer, config.run_folder)
    kept = Layout(config.run_folder).standard_input
    if kept is None:
        raise UserError(
            f"-: the data is to come on standard input, nothing comes, and {config.run_folder} has kept nothing from a "
            "run before: pipe it into `pipeline run` or `pipeline data`, e.g. `zcat rows.jsonl.gz | pipeline run`"
        )
    update: dict[str, Any] = {
        key: kept for key in ("train", "validation", "test") if getattr(data, key) == STANDARD_INPUT
    }
    update["sources"] = tuple(
        source.model_copy(update={"path": kept}) if source.path == STANDARD_INPUT else source for source in data.sources
    )
    return config.model_copy(update={"data": data.model_copy(update=update)})


def _piped(stream: IO[str] | None) -> bool:
    """Whether something may come: from a pipe or a file, and not from a terminal or the null device."""
    if stream is None:
        return False
    mode = os.fstat(stream.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _keep(stream: IO[bytes], run: Path) -> None:
    """Write what comes to the run's folder, whole or not at all; where nothing comes, what was kept stays."""
    part = run / ".standard-input.part"
    try:
        with part.open("wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        if not part.stat().st_size:
            return
        if (ending := named_by_content(part)) is None:
            raise UserError(f"-: cannot tell what kind of data came on standard input; known are: {', '.join(KINDS)}")
        before = Layout(run).standard_input
        kept = run / f"standard-input{ending}"
        part.replace(kept)
        if before is not None and before != kept:
            before.unlink()
    finally:
        part.unlink(missing_ok=True)

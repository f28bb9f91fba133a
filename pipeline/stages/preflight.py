"""preflight: the untouched base goes the whole way first, so that what will fail, fails in the first minutes.

A failure stops the run, before anything is trained; nothing is kept of it, so the same command looks again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.resources import resource
from pipeline.run.stage import Work
from pipeline.verify.preflight import failures, preflight
from pipeline.verify.result import FAIL, NOT_RUN, write

NEEDS = ()
# Without export.quant: a type that is asked for later is judged by quantize and verify.
CONFIG = ("model", "train.load_in_4bit", "ollama.name", "ollama.host", "ollama.replace", "ollama.template")


def inputs(config: Config) -> list[Path]:
    """The base's files, the user's own Go template, if there is one, and the pin of the programs."""
    from pipeline.model.facts import base_files

    own = [] if config.ollama.template in ("auto", "go", "native") else [Path(config.ollama.template)]
    return [
        *base_files(config.model),
        *own,
        resource("third_party/pins.toml"),
    ]


def main(work: Work) -> dict[str, Any]:
    """Write preflight.json."""
    with tempfile.TemporaryDirectory(dir=work.scratch) as scratch:  # gigabytes, of use to nobody after a failure
        content = preflight(work.config, work.run, Path(scratch))
    if content["verdict"] == FAIL:
        lines = "\n  ".join(failures(content))
        raise UserError(f"this base cannot go the whole way:\n  {lines}\n`--no-preflight` runs the stages anyway")
    for row in content["checks"]:
        if row["verdict"] == NOT_RUN:
            work.warn(f"{row['id']}: not judged: {row['words']}")
    write(work.output / "preflight.json", content)
    return {"verdict": content["verdict"], **{name.replace(" ", "_"): n for name, n in content["counts"].items()}}

"""Commands as a user types them, in this process; their stages are forked from one process that imports once."""

import atexit
from functools import cache
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.run.launcher import Launcher


@cache
def launcher() -> Launcher:
    """Of all stages that a process of tests runs."""
    started = Launcher()
    atexit.register(started.close)
    return started


def pipeline(*arguments: str | Path, **options: Any) -> Result:
    """`pipeline ARGUMENTS`; options are those of click's runner, e.g. `input`.

    The environment of stages is that of the first command; a test that changes it gives its command another process.
    """
    return CliRunner().invoke(main, [str(argument) for argument in arguments], obj=launcher(), **options)

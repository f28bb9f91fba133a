"""What the process of one stage does; `pipeline.run.host` forks it.

A process of its own gives each stage its peak memory, its memory back, and libraries that no other stage has patched.
What libraries print goes to the stage's log; the terminal is for what `pipeline.console` says.
"""

import importlib
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

from pipeline import console
from pipeline.config import Config
from pipeline.errors import PipelineError, full_disk
from pipeline.run.folder import write_whole
from pipeline.run.graph import Node
from pipeline.run.layout import Layout
from pipeline.run.stage import Stage, Task


def main(run: Path, packages: str, module: str, name: str, variant: str, failure: Exception | None) -> int:
    """Run one stage and leave its result, or its error, in the partial folder.

    Args:
        run: the run's folder.
        packages: the folder in which the top-level package of the module lies.
        module: the module with the stage's declaration.
        name: the stage's name.
        variant: which of its variants.
        failure: what came of importing the stage's libraries, if that went wrong.
    """
    node, layout = Node(name, variant), Layout(run)
    partial, log = layout.partial(name, variant), layout.log(name, variant)
    _quiet(log)
    config = Config.model_validate_json(layout.config.read_text(encoding="utf-8"))
    stage = None
    try:
        stage = _declared(packages, module, name)
        if failure is not None:
            raise failure
        task = Task(stage, config, run, partial / "output", variant, partial / "scratch")
        figures = stage.run(task)
        result = {"figures": figures, "warnings": task.warnings, "commands": task.commands}
        status = 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except PipelineError as error:
        result, status = {"error": f"{node}: {error}"}, error.exit_status
    except Exception as error:
        if full_disk(error):  # what was half written is in the way of everything, and of saying so
            shutil.rmtree(partial / "output", ignore_errors=True)
        traceback.print_exc()
        result, status = {"error": f"{node}: {_explain(error, run, stage)}; the log is {log}"}, 1
    write_whole(partial / "result.json", json.dumps(result, default=str))
    return status


def _declared(packages: str, module: str, name: str) -> Stage:
    if packages not in sys.path:
        sys.path.append(packages)
    values = vars(importlib.import_module(module)).values()
    return next(value for value in values if isinstance(value, Stage) and value.name == name)


def _explain(error: Exception, run: Path, stage: Stage | None) -> str:
    if full_disk(error):
        return f"no space left on the disk of {run}; free some and give the same command again"
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return f"out of memory: {stage.smaller}" if stage else "out of memory"
    first_line = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first_line[0] if first_line else 'no message'}"


def _quiet(log: Path) -> None:
    """Send what libraries and child programs print to the log, and keep the terminal for the console."""
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace", buffering=1)
    print_to(log)
    console.write_to(terminal)


def print_to(log: Path) -> None:
    """Have everything that this process and its children print appended to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)

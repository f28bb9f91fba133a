"""Stages of the tests' own: three, the second with a variant for each quantization type, do what is in their input.

A stage runs in a process of its own, which imports this module.
"""

import os
import signal
import sys
import time
from typing import Any

from pipeline.errors import PipelineError, UserError
from pipeline.run.stage import EVERY_JUDGED_STAGE, Stage, Task


def _first(task: Task) -> dict[str, Any]:
    text = task.config.data.train.read_text()
    (task.output / "text.txt").write_text(f"{text}{task.config.train.seed}")
    (task.output / "unread.txt").write_text(str(task.config.train.seed + len(text)))
    if "undeclared" in text:
        task.config.train.model_copy(update={"seed": 1}).batch  # noqa: B018
    return {"length": len(text)}


def _second(task: Task) -> dict[str, Any]:
    text = (task.layout.node("first") / "text.txt").read_text()
    (task.output / "half.txt").write_text("half")
    (task.output / "found.txt").write_text(" ".join(path.name for path in task.scratch.iterdir()))
    if "user mistake" in text:
        raise UserError("the text is wrong; write another")
    if "disk full" in text:
        (task.output / "large.txt").write_bytes(bytes(2**24))
    if "large" in text:
        raise MemoryError
    if "broken" in text:
        raise ValueError("a detail")
    if "killed" in text and not (again := task.run.with_name("again")).exists():
        (task.scratch / "left").touch()
        again.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if "slow" in text:
        time.sleep(60)
    (task.output / "upper.txt").write_text(text.upper() + task.variant)
    task.warn(f"variant {task.variant}")
    return {}


def _third(task: Task) -> dict[str, Any]:
    parts = sorted(path.read_text() for path in task.layout.node("second").glob("*/upper.txt"))
    (task.output / "all.txt").write_text(" ".join(parts))
    if not parts:
        raise PipelineError("the second stage left nothing")
    return {"parts": len(parts)}


def _look(task: Task) -> dict[str, Any]:
    import tokenize

    touched = hasattr(tokenize, "touched_by_a_stage")
    tokenize.touched_by_a_stage = True  # type: ignore[attr-defined]
    (task.output / "looked.txt").touch()
    return {"imported": "torch" in sys.modules, "touched": touched, "hash": hash("a text")}


FIRST = Stage(
    name="first",
    summary="Write the text.",
    run=_first,
    settings=("train.seed", "data.train"),
    files=lambda config, _: [config.data.train],
)
SECOND = Stage(
    name="second",
    summary="Write it in capitals.",
    smaller="write a shorter text",
    run=_second,
    needs=("first",),
    reads={"first": ("*.txt", "!unread.txt")},
    variants=lambda config: config.export.quant,
    judged=True,
)
THIRD = Stage(
    name="third",
    summary="Join the texts.",
    run=_third,
    needs=(EVERY_JUDGED_STAGE,),
    removes=lambda config: {} if config.merge.keep else {"second": ("upper.txt",)},
    unfinished=lambda figures: "there were no two" if figures["parts"] == 1 else None,
)
STAGES = (FIRST, SECOND, THIRD)

LIGHT = Stage(name="light", summary="Look around.", run=_look, libraries=("torch",), begins_with=())
HEAVY = Stage(name="heavy", summary="Look around.", run=_look, libraries=("torch",), variants=lambda _: ("a", "b"))
PATCHING = Stage(name="patching", summary="Look around.", run=_look, libraries=("torch",), imports_first=True)

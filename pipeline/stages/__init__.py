"""The stages in the order of the work. Each is a file of its own that ends in its declaration, `STAGE = Stage(...)`."""

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.run.stage import Stage

NAMES = (
    "preflight", "data", "train", "merge", "convert", "quantize", "modelfile", "deploy", "evaluate", "verify", "report",
)  # fmt: skip


def declared(name: str) -> "Stage":
    """A stage's declaration."""
    stage: Stage = importlib.import_module(f"{__name__}.{name}").STAGE
    return stage


def all_stages(config: "Config | None" = None) -> tuple["Stage", ...]:
    """Every declaration; where a configuration gives adapters, that which takes it in stands for training."""
    given = config is not None and bool(config.given_adapters)
    return tuple(declared("adapter" if given and name == "train" else name) for name in NAMES)


def judged_stages() -> tuple[str, ...]:
    """The names of the stages whose outputs `verify` judges."""
    return tuple(stage.name for stage in all_stages() if stage.judged)


def summary(name: str) -> str:
    """A stage's summary, read from the text of its declaration: importing every stage would take a help page a second.

    Raises:
        ValueError: the file does not end in a declaration with a summary.
    """
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    _, _, declaration = source.rpartition("\nSTAGE = ")
    call = ast.parse(declaration, mode="eval").body
    for word in call.keywords if isinstance(call, ast.Call) else ():
        if word.arg == "summary":
            return str(ast.literal_eval(word.value))
    raise ValueError(f"{name}.py does not end in STAGE = Stage(..., summary=...)")

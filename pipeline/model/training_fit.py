"""What the training that a configuration asks for needs of memory, and the nearest settings with which it fits."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from pipeline.model import training_memory

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.model.shape import Shape


def needed(
    settings: Config, shape: Shape, longest: int, *, on_gpu: bool, validates: bool
) -> training_memory.TrainingMemory:
    """The parts of the training's peak.

    Args:
        settings: the resolved configuration.
        shape: the base and its adapter.
        longest: the longest row, in tokens.
        on_gpu: it is trained on a GPU.
        validates: there is validation data.
    """
    train = settings.train
    assert train.batch is not None
    options: dict[str, Any] = {
        "in_4bit": train.load_in_4bit,
        "checkpointing": bool(train.gradient_checkpointing),
        "optimizer": train.optimizer or "",
    }
    if on_gpu:
        return training_memory.on_gpu(shape, train.batch * longest, **options)
    from pipeline.model.load import compute_type

    return training_memory.on_processor(
        shape,
        train.batch * longest,
        bfloat16=compute_type("cpu").itemsize == 2,
        validates=validates,
        **options,
    )


def nearest(settings: Config, shape: Shape, longest: int, there: int, *, on_gpu: bool, validates: bool) -> str | None:
    """The mildest change of settings with which the training fits, what costs no time first; None without one.

    Args: as `needed`, and
        there: the bytes that there are.
    """
    train, rows = settings.train, settings.train.batch or 1
    change: dict[str, Any] = {}
    changes: list[tuple[dict[str, Any], int]] = []  # each milder than the next, with its longest row

    def add(**more: Any) -> None:
        change.update(more)
        changes.append((dict(change), min(longest, change.get("max_length", longest))))

    if not train.load_in_4bit:
        add(load_in_4bit=True)
    if not train.gradient_checkpointing:
        add(gradient_checkpointing=True)
    while rows > 1:
        rows //= 2
        add(batch=rows, accumulation=math.ceil((train.batch or 1) * (train.accumulation or 1) / rows))
    shorter = longest
    while shorter > 512:
        shorter //= 2
        add(max_length=shorter)
    for update, tokens in changes:
        changed = settings.model_copy(update={"train": train.model_copy(update=update)})
        if needed(changed, shape, tokens, on_gpu=on_gpu, validates=validates).needed <= there:
            return "set " + ", ".join(f"train.{key}={json.dumps(value)}" for key, value in update.items())
    return None

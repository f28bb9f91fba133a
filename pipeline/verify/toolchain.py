"""toolchain: converter, quantizer and server are of one pin, and every file is still the one that was made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.console import progress
from pipeline.llamacpp.programs import programs_folder, source_tree
from pipeline.resources import sha256_of
from pipeline.run.folder import read_manifest, without_removed
from pipeline.setup.pins import pins
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result

_ONE_PIN = Claim("toolchain.pin", "convert", "converter, quantizer, gguf-py and server are of one pin")
_SAME_PIN = Claim("toolchain.run", "convert", "the run was made with this pin")
_FILES = "every file is the one that the manifest describes"


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge the programs, then the run's files."""
    yield check_pin()
    if artefacts.run is None:
        yield _SAME_PIN.not_run("this export has no manifest")
        return
    manifest = read_manifest(artefacts.run)
    stages = {name: record for name, record in manifest["stages"].items() if name in manifest.get("nodes", [name])}
    yield _same_pin(stages)
    yield from _files(artefacts.run, stages)


def _same_pin(stages: dict[str, dict[str, Any]]) -> Result:
    now = pins()["llama.cpp"]
    made_with = {
        name: record.get("made_with", {}).get("pins", {}).get("llama.cpp")
        for name, record in stages.items()
        if name.partition("/")[0] in ("convert", "quantize")
    }
    if not made_with or None in made_with.values():
        return _SAME_PIN.not_run("the run has no manifest that names a pin")
    other = [f"{name} was made with {pin}, this is {now}" for name, pin in made_with.items() if pin != now]
    return _SAME_PIN.holds(not other, "; ".join(other), now["version"])


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


def _files(run: Path, stages: dict[str, dict[str, Any]]) -> Iterator[Result]:
    wanted = {name: record for name, record in stages.items() if record.get("judged")}
    if not wanted:
        yield Claim("toolchain.files", "data", _FILES).not_run("the manifest names no files")
        return
    with progress("the files' hashes", len(wanted), "stages") as update:
        for number, (stage, record) in enumerate(wanted.items(), 1):
            changed = []
            for name, recorded in without_removed(run, record["outputs"]).items():
                path = run / name
                if not path.is_file():
                    changed.append(f"{name} is missing")
                elif sha256_of(path) != recorded["sha256"]:
                    changed.append(f"{name} is not the file that was made")
            yield Claim("toolchain.files", stage, _FILES).at_most(len(changed), 0, "; ".join(changed[:3]))
            update(number)

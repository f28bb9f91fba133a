"""Disks that are too full, a cache that cannot be written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.packages import make_source

from pipeline.errors import PipelineError, UserError
from pipeline.processes import exclusive, run
from pipeline.resources import cache_folder
from pipeline.setup import machine, places
from pipeline.setup.machine_findings import OK, WARNING

ROOT = Path(__file__).parents[2]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    machine.require_space({tmp_path: 1.0, tmp_path / "not" / "there": 1.0})
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(PipelineError, match=r"needs about [\d.,]+ GiB on this disk, [\d.,]+ GiB are free"):
        # Each half would fit.
        machine.require_space({tmp_path: 0.9 * free, tmp_path / "not" / "there": 0.9 * free})


def test_disk_that_fills_while_unpacking_is_one_message(wheels: Path, tmp_path: Path) -> None:
    make_source(wheels, {"vendor/tiny/keep/big": "x" * 1_000_000})
    code = (
        "import resource, sys; from pathlib import Path; from pipeline.setup.fetch import unpack\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"archive, tree = Path({str(wheels / 'tiny_tools-1.0.tar.gz')!r}), Path({str(tmp_path / 'tree')!r})\n"
        "unpack(archive, tree, lambda path: path)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.stderr.splitlines()[-1].startswith("pipeline.errors.NoSpace: ")
    assert "the disk is full; free some space" in answer.stderr.splitlines()[-1]


def test_disk_that_fills_in_a_program_is_one_message(cache: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    code = "import sys; open('/dev/full', 'w').write('x' * 100_000)"
    with pytest.raises(PipelineError, match="testing: the disk is full"):
        run([sys.executable, "-c", code], "testing")


@pytest.mark.parametrize(
    ("folders", "own"), [((), False), (("conda-meta",), True), (("conda-meta", "condabin"), False)]
)
def test_environment_of_conda_is_one_of_its_own_and_its_base_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: tuple[str, ...], own: bool
) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    for name in ("prefix", "base_prefix"):
        monkeypatch.setattr(sys, name, str(tmp_path))
    assert machine.has_own_environment() is own
    assert (machine.python().state == OK) is own
    if not own:
        with pytest.raises(UserError, match="not in a virtual environment"):
            machine.require_virtual_environment()


@pytest.mark.parametrize(
    ("version", "fetches", "state"),
    [
        ("go1.27.1", "local", OK),
        ("go1.26.0", "local", OK),
        ("go1.26rc1", "local", OK),
        ("go1.25.9", "local", WARNING),
        ("go1.25.9", "auto", OK),  # it fetches the newer one itself
        ("go1.20.14", "", WARNING),  # one that knows no such thing
        ("devel +7a3c1f", "local", OK),
    ],
)
def test_go_that_is_too_old_for_ollama_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, fetches: str, state: str
) -> None:
    program = tmp_path / "go"
    program.write_text(f"#!/bin/sh\necho '{version}'\necho '{fetches}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    finding = machine.go()
    assert finding.state == state
    assert ("too old for Ollama" in finding.found) == (state == WARNING)
    assert machine.go(needed=False).state == OK


def test_cache_that_cannot_be_written_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(PipelineError, match=r"PIPELINE_CACHE"), exclusive(places.downloads() / "lock"):
        pass
    monkeypatch.setenv("PIPELINE_CACHE", "~no-such-user/cache")
    with pytest.raises(UserError, match="PIPELINE_CACHE: ~no-such-user/cache: the home folder of this user"):
        cache_folder()

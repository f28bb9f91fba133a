"""The processes of stages: what is slow is imported once for all, and no stage finds what another has touched."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from support.small_stages import HEAVY, LIGHT, PATCHING

from pipeline.config import Config
from pipeline.run.folder import read_manifest
from pipeline.run.graph import Graph
from pipeline.run.launcher import Launcher
from pipeline.run.layout import Layout


def test_a_stage_begins_with_what_it_declares_and_nothing_of_another(tmp_path: Path) -> None:
    values = {"model": {"base": "x"}, "data": {"train": "x"}, "run": {"folder": tmp_path / "run"}}
    config = Config.model_validate(values)
    graph = Graph([LIGHT, HEAVY, PATCHING])
    graph.run(config, {}, graph.nodes(config))
    stages = read_manifest(config.run_folder)["stages"]
    figures = {name: record["figures"] for name, record in stages.items()}
    assert {name: found["imported"] for name, found in figures.items()} == {
        "light": False,
        "heavy/a": True,
        "heavy/b": True,
        "patching": False,
    }
    assert not any(found["touched"] for found in figures.values())
    assert len({found["hash"] for found in figures.values()}) == 1  # what a set's order depends on
    assert all(record["peak_memory_bytes"] > 2**20 for record in stages.values())
    assert all(record["cpu_seconds"] > 0 for record in stages.values())


def test_the_stages_of_several_runs_begin_with_what_those_before_have_imported(tmp_path: Path) -> None:
    graph, imported = Graph([LIGHT, HEAVY]), []
    with closing(Launcher(gpu=False)) as launcher:
        for name in ("one", "two"):
            values = {"model": {"base": "x"}, "data": {"train": "x"}, "run": {"folder": tmp_path / name}}
            config = Config.model_validate(values)
            graph.run(config, {}, graph.nodes(config), launcher=launcher)
            imported.append(read_manifest(config.run_folder)["stages"]["light"]["figures"]["imported"])
    assert imported == [False, True]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose stage "heavy" is about to be started."""
    layout = Layout(tmp_path / "run")
    work = layout.partial("heavy", "a")
    (work / "output").mkdir(parents=True)
    layout.log("heavy", "a").parent.mkdir()
    config = Config.model_validate({"model": {"base": "x"}, "data": {"train": "x"}, "run": {"folder": layout.run}})
    layout.config.write_text(config.model_dump_json())
    return layout.run


def result(run_folder: Path) -> str:
    return (Layout(run_folder).partial("heavy", "a") / "result.json").read_text()


@pytest.mark.parametrize("gpu", [True, False])
def test_where_there_is_a_gpu_nothing_is_imported_before(run_folder: Path, gpu: bool) -> None:
    launcher = Launcher(gpu=gpu)
    ended = launcher.run(run_folder, HEAVY, "a")
    launcher.close()
    assert ended.status == 0
    assert f'"imported": {str(not gpu).lower()}' in result(run_folder)


def stand_in_for_torch(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "first" / "torch").mkdir(parents=True)
    (folder / "first" / "torch" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder / "first"), prepend=os.pathsep)


def test_what_the_next_stage_begins_with_is_imported_while_this_one_runs(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no stage waits for it that has ended."""
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'ended')!r}).exists(): time.sleep(0.05)"
    stand_in_for_torch(tmp_path, waits, monkeypatch)
    partial = Layout(run_folder).partial("light")
    (partial / "output").mkdir(parents=True)
    for imported in (False, True):
        with closing(Launcher(gpu=False)) as launcher:
            assert launcher.run(run_folder, LIGHT, "", HEAVY).status == 0
            if imported:
                (tmp_path / "ended").touch()
                assert launcher.run(run_folder, LIGHT, "").status == 0
        assert json.loads((partial / "result.json").read_text())["figures"]["imported"] == imported


@pytest.mark.parametrize("ahead", [False, True])
def test_library_that_cannot_be_imported_is_named(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """By its first error: a half-imported one fails otherwise the second time."""
    code = "import sys\nif hasattr(sys, 'again'): raise ImportError('partially imported')\nsys.again = True\n"
    stand_in_for_torch(tmp_path, f"{code}raise ImportError('libcudart.so.13: no such file')", monkeypatch)
    (Layout(run_folder).partial("light") / "output").mkdir(parents=True)
    with closing(Launcher(gpu=False)) as launcher:
        if ahead:
            assert launcher.run(run_folder, LIGHT, "", HEAVY).status == 0
        ended = launcher.run(run_folder, HEAVY, "a")
    assert ended.status == 1
    assert "heavy/a: ImportError: libcudart.so.13: no such file; the log is " in result(run_folder)


def test_ctrl_c_while_libraries_are_imported_ends_it_at_once(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"import pathlib, time\npathlib.Path({str(tmp_path / 'importing')!r}).touch()\ntime.sleep(600)"
    stand_in_for_torch(tmp_path, code, monkeypatch)
    host = subprocess.Popen(
        [sys.executable, "-P", "-m", "pipeline.run.host", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    module = HEAVY.run.__module__
    request = {"arguments": [str(run_folder), "", module, "heavy", "a"], "libraries": ["torch"], "then": []}
    assert host.stdin is not None
    print(json.dumps(request), file=host.stdin, flush=True)
    while not (tmp_path / "importing").exists():
        time.sleep(0.05)
        assert host.poll() is None
    host.send_signal(signal.SIGINT)
    assert host.communicate(timeout=30)[0] == ""
    assert host.returncode == -signal.SIGINT

"""The processes of stages: what is slow is imported once for all, and no stage finds what another has touched."""

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
        "patching": False,  # Unsloth has to come first
    }
    assert not any(found["touched"] for found in figures.values())
    assert len({found["hash"] for found in figures.values()}) == 1  # what a set's order depends on
    assert all(record["peak_memory_bytes"] > 2**20 for record in stages.values())
    assert all(record["cpu_seconds"] > 0 for record in stages.values())


@pytest.mark.parametrize("gpu", [True, False])
def test_where_there_is_a_gpu_nothing_is_imported_before(tmp_path: Path, gpu: bool) -> None:
    layout = Layout(tmp_path)
    config = Config.model_validate({"model": {"base": "x"}, "data": {"train": "x"}, "run": {"folder": tmp_path}})
    layout.config.write_text(config.model_dump_json())
    work = layout.partial("heavy", "a")
    (work / "output").mkdir(parents=True)
    layout.log("heavy", "a").parent.mkdir()
    launcher = Launcher(gpu=gpu)
    ended = launcher.run(tmp_path, HEAVY, "a")
    launcher.close()
    assert ended.status == 0
    assert (f'"imported": {str(not gpu).lower()}') in (work / "result.json").read_text()

"""The page and `status`: what the manifest has of a run, written for a person."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import small_models

from pipeline.cli import main
from pipeline.stages import report

STAGES = ("data", "train", "quantize/q4_k_m")


def made_up(folder: Path, *, gpu: bool) -> Path:
    """A run's folder with what the page and `status` read of it: three stages, of which training may have a GPU."""
    record = {**small_models.RECORD, "figures": {"bytes": 145_000_000}}
    used_gpu = {**record, "figures": {"peak_gpu_bytes": 9_800_000_000}}
    manifest = {
        "nodes": STAGES,
        "stages": dict.fromkeys(STAGES, record) | ({"train": used_gpu} if gpu else {}),
        "machine": {"system": "Linux", "cores": 2, "memory_bytes": 8_000_000_000},
        "versions": {},
        "pins": {},
        "config": {"values": {}, "sources": {}},
    }
    (folder / "run" / "train").mkdir(parents=True)
    (folder / "run" / "train" / "loss.svg").write_text("<svg></svg>")
    (folder / "run" / "manifest.json").write_text(json.dumps(manifest))
    return folder / "run"


@pytest.mark.parametrize("gpu", [False, True])
def test_the_page_shows_a_gpu_s_peak_memory_where_there_is_one(tmp_path: Path, gpu: bool) -> None:
    task = small_models.make_task(made_up(tmp_path, gpu=gpu), "report")
    report.main(task)
    page = (task.output / "report.html").read_text(encoding="utf-8")
    assert re.findall(r">([\d.]+ GB)</b><span>peak (\w+ ?\w*)<", page) == [
        ("2.10 GB", "memory"),
        *([("9.80 GB", "GPU memory")] if gpu else []),
    ]
    assert page.count('<td class="number">2.10 GB</td>') == (2 if gpu else 3)
    assert page.count('<td class="number">2.10 GB, GPU 9.80 GB</td>') == gpu
    assert page.count("GPU") == (2 if gpu else 0)


@pytest.mark.parametrize("gpu", [False, True])
def test_status_shows_a_gpu_s_peak_memory_where_there_is_one(tmp_path: Path, gpu: bool) -> None:
    made_up(tmp_path, gpu=gpu)
    (tmp_path / "train.jsonl").touch()
    config = tmp_path / "pipeline.toml"
    config.write_text('[model]\nbase = "smollm2-135m-instruct"\n[data]\ntrain = "train.jsonl"\n')
    shown = CliRunner().invoke(main, ["status", str(config)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("2.10 GB") == 3
    assert shown.stdout.count("2.10 GB, GPU 9.80 GB") == gpu

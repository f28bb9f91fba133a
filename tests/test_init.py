"""pipeline init: what it writes runs as it is, and nothing is ever overwritten."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import Result
from support.commands import pipeline

from pipeline.config import meanings
from pipeline.init import starting_files, write_new
from pipeline.run.stage import Task
from pipeline.stages import data
from pipeline.toml_file import load_config

ROOT = Path(__file__).parent.parent


def init(*arguments: str | Path) -> Result:
    return pipeline("init", *arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_passes_the_data_stage(tmp_path: Path) -> None:
    folder = tmp_path / "a new" / "model"
    result = init(folder)
    assert result.exit_code == 0, result.stderr
    assert sorted(contents(folder)) == ["pipeline.toml", "test.jsonl", "train.jsonl"]
    assert f"cd '{folder}'" in result.stderr
    command = [sys.executable, "-m", "pipeline", "config", folder]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "warning" not in answer.stderr
    config, _ = load_config(folder / "pipeline.toml")
    (output := config.run_folder / "data").mkdir(parents=True)
    task = Task(data.STAGE, config, config.run_folder, output, "", tmp_path / "scratch")
    assert data.main(task)["train_rows"] > 0
    assert not task.warnings


def test_without_a_folder_it_is_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = init()
    assert result.exit_code == 0
    assert "cd " not in result.stderr
    assert (tmp_path / "pipeline.toml").is_file()


def test_every_line_has_its_meaning_and_every_commented_key_can_be_used(tmp_path: Path) -> None:
    write_new(tmp_path, starting_files() | {"validation.jsonl": ""})
    path = tmp_path / "pipeline.toml"
    text = path.read_text(encoding="utf-8")
    section, keys = "", []
    for line in text.splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
        elif key := re.match(r"(?:# )?(\w+) = .*?  # (.*)", line):
            keys.append(f"{section}.{key[1]}")
            assert meanings()[keys[-1]] == key[2]
    assert len(keys) > 12
    path.write_text(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE), encoding="utf-8")
    _, given = load_config(path)
    assert {re.sub(r"^(\w+\.\w+).*", r"\1", key) for key in given} == set(keys)


@pytest.mark.parametrize("name", ["pipeline.toml", "train.jsonl", "test.jsonl"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    result = init(tmp_path)
    assert result.exit_code == 2
    assert f"error: {tmp_path / name}: there already" in result.stderr
    assert contents(tmp_path) == {name: b"mine"}


def test_a_second_time_changes_nothing_and_names_every_file(tmp_path: Path) -> None:
    assert init(tmp_path).exit_code == 0
    before = contents(tmp_path)
    result = init(tmp_path)
    assert result.exit_code == 2
    assert all(str(tmp_path / name) in result.stderr for name in before)
    assert contents(tmp_path) == before


def test_a_link_to_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "test.jsonl").symlink_to(tmp_path / "elsewhere")
    result = init(tmp_path / "project")
    assert result.exit_code == 2
    assert not (tmp_path / "elsewhere").exists()
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["test.jsonl"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_is_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    result = init(tmp_path / name)
    assert result.exit_code == 2
    assert "give the name of a folder" in result.stderr
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_full_disk_leaves_nothing_half_written(small_disk: Path) -> None:
    with (small_disk / "filler").open("wb") as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(2**16))
            filler.flush()
    result = init(small_disk)
    assert result.exit_code == 1
    assert "no space left on the disk" in result.stderr
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_it_works_from_a_wheel(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        wheel.extractall(tmp_path / "installed")
    folder = tmp_path / "project"
    answer = subprocess.run(
        [sys.executable, "-m", "pipeline", "init", folder],
        cwd=tmp_path / "installed",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert contents(folder) == {name: text.encode() for name, text in starting_files().items()}

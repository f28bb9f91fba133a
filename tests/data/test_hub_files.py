"""Data sets of a hub: the real libraries, asked against a small hub on a loopback port."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import hub

from pipeline.data.hub_files import HubData
from pipeline.errors import UserError
from pipeline.toml_file import load_config

CARD = """---
configs:
- config_name: default
  default: true
  data_files:
  - split: train
    path: plain/train-*.jsonl
  - split: test
    path: plain/test.jsonl
- config_name: german
  data_files: german.csv
---
"""


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data-set")
    (folder / "README.md").write_text(CARD)
    (folder / "plain").mkdir()
    for name in ("train-1", "train-2", "test"):
        (folder / "plain" / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "a"}) + "\n")
    (folder / "german.csv").write_text("prompt,completion\nEins?,1\nZwei?,2\n")
    (folder / "chats.py").write_text("raise SystemExit('a script was run')")
    return folder


def ask(address: str, home: Path, *given: str, **variables: str) -> list[Any]:
    """For each data set the prompts of its rows and the folder of their files, or the error."""
    program = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from pipeline.data.sources import files_of, rows_of\n"
        "from pipeline.errors import PipelineError\n"
        "for given in sys.argv[1:]:\n"
        "    try:\n"
        "        folder = str(files_of(Path(given))[0])\n"
        "        print(json.dumps([[row['prompt'] for _, row in rows_of(Path(given))], folder]))\n"
        "    except PipelineError as error:\n"
        "        print(json.dumps(f'{error.exit_status} {error}'))\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "PIPELINE_CACHE": str(home / "own")}
    for key in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        environment.pop(key, None)
    environment |= variables
    done = subprocess.run(
        [sys.executable, "-c", program, *given], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_configuration_a_split_and_a_revision(data_set: Path, tmp_path: Path) -> None:
    known = ("hf:someone/chats", "hf:someone/chats::test@v1", f"hf:someone/chats:german@{hub.COMMIT}")
    unknown = (
        "hf:someone/chats:french", "hf:someone/chats::validation", "hf:someone/chats@v9", "hf:someone/nothing",
        "hf:someone/gated", "hf:chats",
    )  # fmt: skip
    with hub.Hub("someone/chats", data_set) as server:
        answers = ask(server.address, tmp_path, *known, *unknown)
    expected = [["train-1", "train-2"], ["test"], ["Eins?", "Zwei?"]]
    assert [answer[0] for answer in answers[:3]] == expected
    assert all(hub.COMMIT in Path(answer[1]).parts for answer in answers[:3])  # what a run records of its inputs
    for answer, said in zip(
        answers[3:],
        (
            "2 data: someone/chats has no configuration 'french'; it has default, german",
            "2 data: someone/chats has no split 'validation'; it has train, test",
            "2 data: someone/chats has no revision v9",
            "2 data: the hub has no someone/nothing",
            "2 data: someone/gated is gated",
            "2 hf:chats: a data set of a hub is written hf:OWNER/NAME",
        ),
        strict=True,
    ):
        assert answer.startswith(said)
    # Afterwards the hub is not asked: a branch stays what it was.
    (again,) = ask(server.address, tmp_path, known[0], HF_HUB_OFFLINE="1")
    assert again == answers[0]
    (gone,) = ask(server.address, tmp_path / "elsewhere", known[0], HF_HUB_OFFLINE="1")
    assert gone.startswith("1 data: someone/chats cannot be fetched from the hub")
    fetched = {path.name for path in (tmp_path / "hub").rglob("snapshots/*/**/*") if path.is_file()}
    assert "chats.py" not in fetched


def test_scripts_are_not_run(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "chats.py").write_text("raise SystemExit('a script was run')")
    with hub.Hub("someone/chats", tmp_path / "set") as server:
        (answer,) = ask(server.address, tmp_path, "hf:someone/chats")
    assert answer.startswith("2 data: someone/chats has no files of rows that can be read (scripts are not run)")


def test_the_name_is_no_path(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.toml"
    path.write_text('[model]\nbase = "smollm2-135m-instruct"\n[data]\ntrain = "hf:a/b:c:d@e"\n')
    config, _ = load_config(path)
    assert config.data.train is not None
    assert HubData.of(config.data.train) == HubData("a/b", "c", "d", "e")
    with pytest.raises(UserError, match="is written hf:OWNER/NAME"):
        HubData.of(Path("hf:a/b@c@d"))

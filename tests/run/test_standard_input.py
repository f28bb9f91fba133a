"""Data that comes on standard input: kept in the run's folder, as it came, and the data of every later command."""

import gzip
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from click.testing import Result
from pyarrow import parquet
from support import small_models
from support.commands import pipeline

from pipeline.config import Config
from pipeline.data.formats import read_conversations
from pipeline.errors import UserError
from pipeline.run.standard_input import with_standard_input
from pipeline.toml_file import load_config

ROWS = [{"prompt": f"Say {number}", "completion": f"It is {number}."} for number in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline.toml"
    path.write_text(f'[model]\nbase = "{small_models.base_folder()}"\n[data]\ntrain = "-"\n')
    return path


@pytest.fixture
def taken(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Config]:
    """What a command makes of the configuration when this comes on its standard input, or b"": a device without end."""

    def take(content: bytes) -> Config:
        came = tmp_path / "came"
        came.write_bytes(content)
        with (came if content else Path(os.devnull)).open() as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            return with_standard_input(load_config(project)[0], read=True)

    return take


def parquet_file() -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file.getvalue()


def arrow_stream() -> bytes:
    table, file = pyarrow.Table.from_pylist(ROWS), io.BytesIO()
    with pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def separated(delimiter: str) -> bytes:
    return "".join(f"{delimiter.join(row)}\n" for row in (ROWS[0], *(row.values() for row in ROWS))).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        (LINES, ".jsonl"),
        (b"\xef\xbb\xbf\n" + LINES, ".jsonl"),
        (gzip.compress(LINES), ".jsonl.gz"),
        (zstd(LINES), ".jsonl.zst"),
        (json.dumps(ROWS).encode(), ".json"),
        (json.dumps({"train": ROWS}).encode(), ".json"),
        (parquet_file(), ".parquet"),
        (arrow_stream(), ".arrow"),
        (gzip.compress(separated(",")), ".csv.gz"),
        (separated("\t"), ".tsv"),
    ],
)
def test_what_comes_is_kept_as_it_came_under_the_name_of_its_kind(
    taken: Callable[[bytes], Config], content: bytes, ending: str
) -> None:
    kept = taken(content).data.train
    assert kept is not None
    assert kept.name == f"standard-input{ending}"
    assert kept.read_bytes() == content
    assert [row.answer for row in read_conversations(kept)] == [row["completion"] for row in ROWS]


def test_what_was_kept_stays_until_something_else_comes(taken: Callable[[bytes], Config]) -> None:
    with pytest.raises(UserError, match="nothing comes, and .* has kept nothing .*: pipe it into"):
        taken(b"")
    first = taken(LINES).data.train
    assert taken(b"").data.train == first
    for broken, words in ((b"no rows", "cannot tell what kind"), (gzip.compress(LINES)[:60], "cut off")):
        with pytest.raises(UserError, match=words):
            taken(broken)
        assert taken(b"").data.train == first
    second = taken(parquet_file()).data.train
    assert second is not None
    assert second != first
    assert [path.name for path in second.parent.iterdir() if "standard-input" in path.name] == [second.name]


def test_a_later_command_takes_what_was_kept_and_other_rows_make_the_data_stale(project: Path) -> None:
    def command(name: str, *options: str, given: bytes) -> Result:
        (came := project.parent / "came").write_bytes(given)
        with (came if given else Path(os.devnull)).open("rb") as stream:
            return pipeline(name, project, *options, input=stream)

    def state(given: bytes = b"") -> str:
        found = command("status", "--json", given=given)
        assert found.exit_code == 0, found.stderr
        states = {row["stage"]: row["reason"] or row["state"] for row in json.loads(found.stdout)["stages"]}
        return str(states["data"])

    refused = command("data", given=b"")
    assert refused.exit_code == 2
    assert "nothing comes" in refused.stderr
    assert command("data", given=LINES).exit_code == 0
    assert state(given=b"not read by a command that starts no stage") == "fresh"
    rows = (project.parent / "run" / "data" / "train.jsonl").read_bytes()
    assert command("data", given=LINES[: len(LINES) // 2].rpartition(b"\n")[0]).exit_code == 0
    assert len((project.parent / "run" / "data" / "train.jsonl").read_bytes()) < len(rows)
    assert state() == "fresh"

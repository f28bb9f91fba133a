"""The same rows from every kind of file, and what is said of a file that cannot be read."""

import csv
import gzip
import io
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.data import json_stream
from pipeline.data.formats import Conversation, Reading, conversations, read_conversations
from pipeline.data.sources import files_of, read_rows, rows_of
from pipeline.errors import UserError

LIGHT = {"name": "light", "parameters": {"type": "object", "properties": {"room": {"type": "string"}}}}
WEATHER = {"name": "weather", "description": "of a town", "parameters": {"properties": {"town": {"type": "string"}}}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    called = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [called]}


# Rows that share no key below the first level: Arrow gives every row the keys of all.
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": 'say "a, b"\nor 你好\t'}, {"role": "assistant", "content": "a\u2028"}]},
    {
        "messages": [
            {"role": "user", "content": "On!", "name": "Ann"},
            call("light", room="hall", level=3),
            {"role": "tool", "content": "{}", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Done.", "reasoning_content": "Easy."},
        ],
        "tools": [{"type": "function", "function": LIGHT}],
    },
    {
        "messages": [{"role": "user", "content": "Sun?"}, call("weather", town="Oslo", days=[1, 2])],
        "tools": [{"type": "function", "function": WEATHER}],
    },
]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def indented(rows: Any) -> bytes:
    return json.dumps(rows, indent=1).encode()


def cells(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["tools", "messages"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({key: json.dumps(value) for key, value in row.items()} for row in rows)
    return file.getvalue().encode()


def arrow(rows: list[dict[str, Any]], kind: str) -> bytes:
    table = pyarrow.Table.from_struct_array(pyarrow.array(rows))
    sink = pyarrow.BufferOutputStream()
    if kind == "parquet":
        parquet.write_table(table, sink)
    else:
        new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": lines,
    "a.ndjson": lines,
    "lines.json": lines,
    "list.json": indented,
    "wrapped.json": lambda rows: indented({"train": rows}),
    "line.json": lambda rows: json.dumps({"data": rows}).encode(),
    "a.csv": cells,
    "a.tsv": lambda rows: cells(rows, "\t"),
    "a.parquet": lambda rows: arrow(rows, "parquet"),
    "file.arrow": lambda rows: arrow(rows, "file"),
    "stream.arrow": lambda rows: arrow(rows, "stream"),
}


def compressed(data: bytes, way: str) -> bytes:
    if way == ".gz":
        return gzip.compress(data)
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True)) if way else data


def as_lines(path: Path) -> list[str]:
    return [row.as_line() for row in read_conversations(path)]


@pytest.mark.parametrize("way", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", KINDS)
def test_the_same_rows_in_every_kind_of_file_in_any_order_of_columns(tmp_path: Path, name: str, way: str) -> None:
    wanted = as_lines(written(tmp_path / "wanted.jsonl", lines(ROWS)))
    assert '"level":3' in wanted[1]
    assert "null" not in "".join(wanted)
    for rows in (ROWS, [dict(reversed(row.items())) for row in ROWS]):
        path = written(tmp_path / (name + way), compressed(KINDS[name](rows), way))
        assert as_lines(path) == wanted


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(data)
    return path


def test_a_folder_and_a_pattern_are_all_their_files_in_order(tmp_path: Path) -> None:
    for number, (name, write) in enumerate(KINDS.items()):
        written(tmp_path / "data" / f"{number:02}" / name, write(ROWS[number % 3 : number % 3 + 1]))
    for name in ("README.md", ".gitattributes", "state.json", "dataset_info.json"):
        (tmp_path / "data" / name).write_text("no rows")
    wanted = [
        read_conversations(written(tmp_path / "w.jsonl", lines(ROWS)))[at % 3].as_line() for at in range(len(KINDS))
    ]
    assert as_lines(tmp_path / "data") == wanted
    assert [file.name for file in files_of(tmp_path / "data" / "0*" / "*.json")] == [
        "lines.json", "list.json", "wrapped.json", "line.json",
    ]  # fmt: skip
    assert len(as_lines(tmp_path / "data" / "**" / "*.arrow")) == 2
    with pytest.raises(UserError, match=r"\*\.xml: no file fits this pattern"):
        as_lines(tmp_path / "data" / "*.xml")
    (tmp_path / "data" / "rows.xml").write_text("<row/>")
    with pytest.raises(UserError, match=r"rows\.xml: cannot tell what kind of file this is; .* move it out of"):
        as_lines(tmp_path / "data")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("way", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, name: str, way: str, cut: float) -> None:
    data = compressed(KINDS[name](ROWS * 20), way)
    path = written(tmp_path / (name + way), data[: int(len(data) * cut)])
    rows, refused = read_all(path)
    named = [*[str(row) for row in rows if isinstance(row, UserError)], *refused]
    assert all(words.startswith(f"{path}:") and "\n" not in words for words in named)
    # Where a line ends, nobody sees that lines are missing.
    assert len(named) == 1 or (
        not named and not way and name in ("a.jsonl", "a.ndjson", "lines.json", "a.csv", "a.tsv")
    )
    assert len(rows) < 20 * len(ROWS)


def read_all(path: Path) -> tuple[list[Any], list[str]]:
    """The rows that a file gives, and the words with which it is refused as a whole."""
    rows = []
    try:
        for _, row in conversations(path):
            rows.append(row)
    except UserError as error:
        return rows, [str(error)]
    return rows, []


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("a.json", b'{"train": [{"a": 1}], "test": []}', 'has "test" beside "train"'),
        ("a.json", b'{"train": [{"a": 1}]} x', "not valid JSON at column 23: more follows"),
        ("a.json", b'[{"a": 1}', "not valid JSON"),
        ("a.json", b'[{"a": 1},]', "not valid JSON at column 11"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', r":2: not valid JSON at column 1: ',' should stand here"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.csv", b"a,a\n1,2\n", ':1: the column "a" occurs twice'),
        ("a.csv", b"a,b\n1,\xff\n", "not UTF-8"),
        ("a.csv.gz", b"a,b\n1,2\n", "cannot be read"),
        ("a.jsonl.zst", b"{}\n", "not|cannot be read"),
        ("a.arrow", b"ARROW1\0\0", "not Arrow that can be read"),
        ("a.arrow", b"", "not Arrow that can be read|holds no rows"),
        ("a.jsonl.xz", b"", "cannot tell what kind of file"),
        ("a.gz", b"", "cannot tell what kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, found: str) -> None:
    path = written(tmp_path / name, data)
    with pytest.raises(UserError, match=found) as caught:
        for _, row in conversations(path, Reading(columns={"messages": "a"})):
            assert not isinstance(row, Conversation)
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)


def test_a_broken_line_is_a_row_and_the_lines_after_it_are_read(tmp_path: Path) -> None:
    good = lines(ROWS[:1])
    path = written(tmp_path / "a.jsonl", good + b"{\n\xff\n[1]\n" + good)
    rows = [row for _, row in conversations(path)]
    assert [type(row) is Conversation for row in rows] == [True, False, False, False, True]
    places = [str(row).removeprefix(f"{path}:")[0] for row in rows if isinstance(row, UserError)]
    assert places == ["2", "3", "4"]
    with pytest.raises(UserError, match=":2: not valid JSON at column 2"):
        list(read_rows(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(rows=st.lists(JSON, max_size=6), piece=st.integers(1, 40), indent=st.sampled_from([None, 0, 2]))
def test_a_list_of_any_values_is_read_in_pieces_of_any_size(
    monkeypatch: pytest.MonkeyPatch, rows: list[Any], piece: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_stream, "PIECE", piece)
    monkeypatch.setattr(json_stream, "LONGEST_WORD", 1000)
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    assert list(json_stream.elements(io.StringIO(text), "a.json")) == rows


# Rows of the keys and the values that rows have, thrown together.
PARTS = st.sampled_from(
    [
        *itertools.chain.from_iterable(row.items() for row in ROWS[1]["messages"]),
        *(("role", "Human"), ("from", "gpt"), ("value", "x"), ("weight", 0), ("weight", 0.5), ("content", None)),
        *(
            ("content", []),
            ("content", [{"type": "image"}]),
            ("images", ["a"]),
            ("thinking", "h"),
            ("tool_calls", [{}]),
        ),
    ]
)
TURN = st.lists(PARTS, max_size=4).map(dict) | JSON
KEYS = st.sampled_from(
    [
        *("messages", "conversations", "prompt", "completion", "instruction", "output", "input", "history", "system"),
        *("tools", "functions", "weight", "loss_mask", "chosen", "images", "reasoning", "id", "text"),
    ]
)
GOOD = st.sampled_from(ROWS)
ROW = st.dictionaries(KEYS, st.lists(TURN, max_size=4) | JSON, max_size=4) | JSON | GOOD


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_of_any_rows_each_is_read_or_named(tmp_path: Path, rows: list[Any]) -> None:
    path = written(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    found = list(conversations(path))
    assert [place for place, _ in found] == [f"{path}:{number}" for number in range(1, len(rows) + 1)]
    for row, (place, read) in zip(rows, found, strict=True):
        if isinstance(read, UserError):
            assert str(read).startswith(place)
            assert row not in ROWS
        else:
            assert read.place == place
            assert Conversation.from_row(json.loads(read.as_line()), place).as_row() == read.as_row()


def test_rows_come_as_a_stream(tmp_path: Path) -> None:
    """The first row is there before the end of the file was looked at."""
    for name, data in (("a.jsonl", lines(ROWS)), ("a.json", indented(ROWS)[:-1])):
        many = data + b" " * (4 << 20) + b"broken"
        path = written(tmp_path / name, many)
        assert next(rows_of(path))[1] == ROWS[0]


def test_random_bytes_are_no_rows(tmp_path: Path) -> None:
    noise = random.Random(0)
    for name, _ in itertools.product(KINDS, range(5)):
        path = written(tmp_path / name, noise.randbytes(noise.randrange(1, 400)))
        rows, refused = read_all(path)
        assert all(isinstance(row, UserError) for row in rows)
        assert all(str(words).startswith(f"{path}:") for words in (*rows, *refused))

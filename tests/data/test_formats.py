"""Every usual shape of a row is read as the same conversation; what is wrong is named with its line."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.data.findings import MarkedRow
from pipeline.data.formats import Conversation, Reading, conversations, read_conversations
from pipeline.data.sources import read_rows
from pipeline.errors import UserError

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
TURNS = {"messages": [USER, ASSISTANT]}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [
        TURNS,
        {"conversations": [USER, ASSISTANT], "system": None},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {
            "conversations": [
                {"from": "user", "value": "Hi"},
                {"from": "assistant", "value": "Hello", "weight": 1},
            ]
        },
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "output": "Hello", "system": ""},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]},
        {"messages": [USER | {"tool_calls": None}, ASSISTANT], "tools": None, "conversations": None},
    ],
)
def test_shapes_give_the_same_conversation(tmp_path: Path, row: dict[str, Any]) -> None:
    (conversation,) = read_conversations(lines(tmp_path / "a.jsonl", row))
    assert conversation.messages == [USER, ASSISTANT]
    assert conversation.as_row() == TURNS
    assert conversation.place == f"{tmp_path / 'a.jsonl'}:1"


def test_a_whole_text_has_no_messages(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "Once upon", "weight": 1, "id": 7})
    (row,) = read_conversations(path, Reading(ignore=("id",), system="Be brief."))
    assert (row.text, row.messages, row.as_row()) == ("Once upon", [], {"text": "Once upon"})
    assert Conversation.from_row(row.as_row(), row.place) == row
    (row,) = read_conversations(lines(path, {"story": "a"}), Reading(format="text", columns={"text": "story"}))
    assert row.text == "a"
    ((_, marked),) = conversations(lines(path, {"text": "a", "train": 0}))
    assert isinstance(marked, MarkedRow)
    with pytest.raises(UserError, match=r"data.format = 'text'"):
        read_conversations(lines(path, TURNS), Reading(format="text"))


def test_alpaca_input_is_added_to_the_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    (conversation,) = read_conversations(lines(tmp_path / "a.jsonl", row))
    assert conversation.messages[0]["content"] == "Add.\n\n1 + 1"


def test_system_message_is_added_where_there_is_none(tmp_path: Path) -> None:
    own = {"conversations": [{"from": "system", "value": "Mine"}, {"from": "human", "value": "a"}]}
    own["conversations"].append({"from": "gpt", "value": "b"})
    path = lines(tmp_path / "a.jsonl", TURNS, own, {"instruction": "a", "output": "b", "system": "Row's"})
    systems = [row.messages[0]["content"] for row in read_conversations(path, Reading(system="Default"))]
    assert systems == ["Default", "Mine", "Row's"]
    assert all(len(row.messages) == 3 for row in read_conversations(path, Reading(system="Default")))


def test_messages_after_the_last_answer_are_cut_and_counted(tmp_path: Path) -> None:
    (row,) = read_conversations(lines(tmp_path / "a.jsonl", {"messages": [USER, ASSISTANT, USER]}))
    assert (row.messages, row.cut) == ([USER, ASSISTANT], 1)


def test_tools_and_calls_are_kept_with_their_arguments_opened(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            ASSISTANT | {"reasoning_content": "Easy."},
        ],
        "tools": json.dumps([tool]),
    }
    (conversation,) = read_conversations(lines(tmp_path / "a.jsonl", row))
    assert conversation.tools == [tool]
    assert conversation.messages[1]["content"] == ""
    assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert conversation.messages[2]["tool_call_id"] == "1"
    assert conversation.messages[3]["reasoning_content"] == "Easy."


def test_byte_order_mark_blank_lines_and_crlf_are_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TURNS).encode() + b"\r\n\r\n" + json.dumps(TURNS).encode())
    assert [row.place.rpartition(":")[2] for row in read_conversations(path)] == ["1", "3"]


def test_json_array_json_lines_csv_and_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [TURNS, {"messages": [{"role": "user", "content": 'say "a, b"\nor 你好'}, ASSISTANT]}]
    (tmp_path / "array.json").write_text("\ufeff\n" + json.dumps(rows, indent=2), encoding="utf-8")
    lines(tmp_path / "lines.json", *rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages"])
        writer.writerows([json.dumps(row["messages"])] for row in rows)
    with (tmp_path / "b.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerows([[message["content"] for message in row["messages"]] for row in rows])
    for name in ("array.json", "lines.json", "a.parquet", "a.csv", "b.csv"):
        assert [row.as_row() for row in read_conversations(tmp_path / name)] == rows, name


def write_bytes(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def write_row(row: Any) -> Callable[[Path], Any]:
    return lambda path: lines(path, TURNS, row)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.jsonl", lambda path: None, "no such file"),
        ("a.jsonl", lambda path: path.mkdir(), "the folder has no data files"),
        ("a.txt", write_bytes(b"hi"), "known are: .jsonl"),
        ("a.jsonl", write_bytes(b""), "holds no rows"),
        ("a.jsonl", write_bytes(b"\xef\xbb\xbf\n \n"), "holds no rows"),
        ("a.json", write_bytes(b"[]"), "holds no rows"),
        ("a.jsonl", write_bytes(b'{"messages": ['), ":1: not valid JSON at column 15"),
        ("a.json", write_bytes(json.dumps([TURNS]).encode()[:-1] + b',\n{"a":}]'), ":2: not valid JSON at column 6"),
        ("a.jsonl", write_bytes(json.dumps(TURNS).encode() + b"\n\xff\xfe"), ":2: not UTF-8 at byte 1"),
        ("a.jsonl", write_bytes(json.dumps(TURNS).encode("utf-16")), ":1: not UTF-8"),
        ("a.jsonl", write_bytes(b"[" * 100_000), ":1: not"),
        ("a.jsonl", write_row([1]), ":2: must be a JSON object"),
        ("a.jsonl", write_row({}), r"keys \(none\); wanted is"),
        ("a.jsonl", write_row({"document": "Hi"}), "keys document; wanted is"),
        ("a.jsonl", write_row({"text": " "}), "the text is empty"),
        ("a.jsonl", write_row({"text": ["Hi"]}), "text: the text is list"),
        ("a.jsonl", write_row({"text": "Hi", "system": "Be brief."}), 'key "system" is not known'),
        ("a.jsonl", write_row({"text": "Hi", "weight": 0.5}), "weight = 0.5"),
        ("a.jsonl", write_row({"prompt": "Hi", "completion": "a", "text": "b"}), 'key "text" is not known'),
        ("a.jsonl", write_row({"messages": []}), "at least one question"),
        ("a.jsonl", write_row({"messages": "Hi"}), "must be a list"),
        ("a.jsonl", write_row({"messages": ["Hi"]}), "message 1: must be an object"),
        (
            "a.jsonl",
            write_row({"messages": [{"role": "alien", "content": ""}]}),
            "unknown role 'alien'; known are",
        ),
        ("a.jsonl", write_row({"messages": [{"content": ""}]}), "unknown role None"),
        ("a.jsonl", write_row({"messages": [{"role": ["user"], "content": ""}]}), "unknown role"),
        ("a.jsonl", write_row({"messages": [USER]}), r"no assistant turn \(its roles: user\)"),
        ("a.jsonl", write_row({"messages": [ASSISTANT]}), "no question before it"),
        (
            "a.jsonl",
            write_row({"messages": [USER, {"role": "assistant", "content": " "}]}),
            "2: .* answer is empty",
        ),
        ("a.jsonl", write_row({"messages": [USER, {"role": "assistant"}]}), "message 2: the text is missing"),
        (
            "a.jsonl",
            write_row({"messages": [USER, {"role": "assistant", "content": {}}]}),
            "the text is dict",
        ),
        ("a.jsonl", write_row({"messages": [USER, ASSISTANT | {"weight": 0}]}), "leave no answer to train"),
        ("a.jsonl", write_row({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}), "surrogate"),
        ("a.jsonl", write_row({"instruction": "a", "output": None}), ":2: output: the text is missing"),
        ("a.jsonl", write_row({"instruction": "a", "output": ""}), "answer is empty"),
        ("a.jsonl", write_row({"prompt": "a"}), "completion: the text is missing"),
        ("a.jsonl", write_row(TURNS | {"tools": "{"}), "tools: not valid JSON"),
        ("a.csv", write_bytes(b"prompt,completion\na,b\nc\n"), ":3: has not as many fields"),
        ("a.csv", write_bytes(b"prompt,completion\na,b,c\n"), ":2: has not as many fields"),
        ("a.csv", write_bytes("prompt,completion\na\u2028b,c\x0cd\ne\n".encode()), ":3: has not as many fields"),
        ("a.csv", write_bytes(b'prompt,completion\na,"b'), "not valid CSV"),
        ("a.parquet", write_bytes(b"PAR1"), "not Parquet that can be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, write: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(UserError, match=message) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_given_shape_refuses_the_others(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", TURNS)
    with pytest.raises(UserError, match=r'wanted is \{"instruction".*data.format = \'alpaca\''):
        read_conversations(path, Reading("alpaca"))
    assert len(read_conversations(path, Reading("messages"))) == 1


# st.text() has no surrogates: such text is refused, see above. The example has what str.splitlines cuts at.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.text().filter(str.strip), min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
@example(texts=["a\u2028b\u2029c\x85d", "a\x0bb\x0cc\x1cd\x1de\x1ef\rg"])
def test_any_text_survives(tmp_path: Path, texts: list[str]) -> None:
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    for ascii_only in (True, False):
        text = json.dumps({"messages": messages}, ensure_ascii=ascii_only)
        (tmp_path / "a.jsonl").write_text(text + "\n", encoding="utf-8", newline="\n")
        assert read_conversations(tmp_path / "a.jsonl")[0].messages == messages
        assert list(read_rows(tmp_path / "a.jsonl")) == [{"messages": messages}]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), texts[:2]])
    assert read_conversations(tmp_path / "a.csv")[0].messages == messages[:2]

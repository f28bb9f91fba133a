"""Every key of a row and of a message is used or named: what is unknown is refused, and what is known is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.expression import Expression
from pipeline.data.findings import RowError
from pipeline.data.formats import Conversation, Reading, conversation_of
from pipeline.data.names import IMAGES_AND_SOUND, PREFERENCES, REASONING, ROLES
from pipeline.errors import UserError

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
TURNS = {"messages": [USER, ASSISTANT]}
PLACE = "a.jsonl:3"


def read(row: Any, **reading: Any) -> Conversation:
    return conversation_of(row, PLACE, Reading(**reading))


SHAPES = [
    TURNS,
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"instruction": "Hi", "output": "Hello"},
    {"prompt": "Hi", "completion": "Hello"},
    {"prompt": [USER], "completion": [ASSISTANT]},
]


@pytest.mark.parametrize("row", SHAPES)
@pytest.mark.parametrize("key", ["id", "score", "Messages", "text", "parallel_tool_calls"])
def test_an_unknown_key_of_a_row_is_refused_unless_it_is_ignored_or_empty(row: dict[str, Any], key: str) -> None:
    with pytest.raises(
        RowError, match=rf'^a\.jsonl:3: the key "{key}" is not known .*known are: .*data\.ignore'
    ) as found:
        read(row | {key: "x"})
    assert found.value.kind == f'unknown key "{key}"'
    assert read(row | {key: "x"}, ignore=(key,)).messages == TURNS["messages"]
    for nothing in (None, "", [], {}):
        assert read(row | {key: nothing}).messages == TURNS["messages"]


@pytest.mark.parametrize("key", ["score", "refusal", "annotations", "audio_id", "text"])
def test_an_unknown_key_of_a_message_is_refused(key: str) -> None:
    row = {"messages": [USER, ASSISTANT | {key: "x"}]}
    with pytest.raises(RowError, match=rf'^a\.jsonl:3: message 2: the key "{key}" is not known'):
        read(row)
    assert read(row, ignore=(key,)).messages == TURNS["messages"]
    assert read({"messages": [USER, ASSISTANT | {key: None}]}).messages == TURNS["messages"]


@pytest.mark.parametrize("row", SHAPES)
@pytest.mark.parametrize("key", IMAGES_AND_SOUND)
def test_images_and_sound_are_refused(row: dict[str, Any], key: str) -> None:
    with pytest.raises(RowError, match=rf'has "{key}", and only texts are trained'):
        read(row | {key: ["a.png"]})
    assert read(row | {key: []}).messages == TURNS["messages"]


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video", "file", "tool_use"])
def test_parts_that_are_no_text_are_refused(kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "a.png"}}]
    with pytest.raises(RowError, match=rf'message 1: part 2: is of the type "{kind}"'):
        read({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    texts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert read({"messages": [{"role": "user", "content": texts}, ASSISTANT]}).messages == TURNS["messages"]


@pytest.mark.parametrize("key", PREFERENCES)
def test_preference_data_is_recognised(key: str) -> None:
    for row in ({"prompt": "Hi", key: "Hello"}, TURNS | {key: "Hello"}, {"prompt": [USER], key: [ASSISTANT]}):
        with pytest.raises(RowError, match=rf"preference data \(its keys: .*{key}.*data\.columns") as found:
            read(row)
        assert found.value.kind == "preference data"


def test_rows_that_say_whether_an_answer_is_wanted_are_preference_data() -> None:
    with pytest.raises(RowError, match="preference data"):
        read({"prompt": "Hi", "completion": "Hello", "label": False})
    row = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
    taken = read(row, columns={"completion": "chosen"}, ignore=("rejected",))
    assert taken.messages == TURNS["messages"]


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("change", [str.upper, str.title, lambda name: f" {name} "])
def test_roles_in_any_case(name: str, change: Any) -> None:
    call = '{"name": "lamp", "arguments": {}}'
    turn = {"from": change(name), "value": call}
    turns = [turn, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    message = read({"conversations": turns}).messages[0]
    assert message["role"] == ROLES[name]
    assert ("tool_calls" in message) == name.endswith("_call")


@pytest.mark.parametrize("key", REASONING)
def test_reasoning_under_any_name(key: str) -> None:
    wanted = [USER, ASSISTANT | {"reasoning_content": "A greeting."}]
    assert read({"messages": [USER, ASSISTANT | {key: "A greeting."}]}).messages == wanted
    assert read({"prompt": "Hi", "completion": "Hello", key: "A greeting."}).messages == wanted
    assert read({"instruction": "Hi", "output": "Hello", key: "A greeting."}).messages == wanted
    other = next(name for name in REASONING if name != key)
    with pytest.raises(RowError, match="an answer has one reasoning"):
        read({"messages": [USER, ASSISTANT | {key: "A greeting.", other: "None."}]})


def test_calls_of_tools_in_every_spelling() -> None:
    wanted = {"function": {"name": "lamp", "arguments": {"on": True}}}
    spellings: list[dict[str, Any]] = [
        {"tool_calls": [wanted]},
        {"tool_calls": [{"function": {"name": "lamp", "arguments": '{"on": true}'}}]},
        {"tool_calls": [{"name": "lamp", "arguments": {"on": True}}]},
        {"tool_calls": json.dumps([wanted])},
        {"function_call": {"name": "lamp", "arguments": '{"on": true}'}},
    ]
    for spelling in spellings:
        row = {"messages": [USER, {"role": "assistant", "content": None, **spelling}]}
        assert read(row).messages[1] == {"role": "assistant", "content": "", "tool_calls": [wanted]}, spelling
    called = {"from": "function_call", "value": '[{"name": "lamp", "arguments": {"on": true}}]'}
    turns = [{"from": "human", "value": "Hi"}, called, {"from": "observation", "value": "{}"}]
    row = {"conversations": [*turns, {"from": "gpt", "value": "Hello"}]}
    assert read(row).messages[1]["tool_calls"] == [wanted]
    assert read(row).messages[2] == {"role": "tool", "content": "{}"}
    assert read(TURNS | {"functions": [{"name": "lamp"}]}).tools == [{"type": "function", "function": {"name": "lamp"}}]


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ({"name": 1}, "must name its function"),
        ("lamp", "tool_calls: not valid JSON"),
        ([["lamp"]], "must be a list of objects"),
        ([{"function": {"name": "lamp", "arguments": "{"}}], "not valid JSON"),
        ([{"function": {"name": "lamp", "arguments": {}, "strict": True}}], 'function: the key "strict" is not known'),
        ([{"function": {"name": "lamp"}, "index": 1}], 'a call of a tool: the key "index" is not known'),
    ],
)
def test_calls_that_cannot_be_read_are_named(call: Any, found: str) -> None:
    calls = [call] if isinstance(call, dict) else call
    with pytest.raises(RowError, match=rf"^a\.jsonl:3: message 2: .*{found}"):
        read({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": calls}]})


def test_alpaca_history_is_what_was_said_before() -> None:
    row = {"instruction": "Hi", "output": "Hello", "history": [["One?", "1"], ["Two?", "2"]]}
    contents = ["One?", "1", "Two?", "2", "Hi", "Hello"]
    assert [message["content"] for message in read(row).messages] == contents
    assert [message["content"] for message in read(row | {"history": json.dumps(row["history"])}).messages] == contents
    with pytest.raises(RowError, match=r"history must be a list of"):
        read(row | {"history": ["One?"]})


def test_columns_are_read_under_other_names() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    assert read({"question": "Hi", "answer": "Hello"}, columns=columns).messages == TURNS["messages"]
    assert read({"dialog": TURNS["messages"]}, columns={"messages": "dialog"}).messages == TURNS["messages"]
    with pytest.raises(RowError, match=r'reads "answer" as "completion", and the row has "completion" too'):
        read({"question": "Hi", "completion": "a", "answer": "Hello"}, columns=columns)
    for row in ({"question": "Hi", "answer": "Hello"}, {"prompt": "Hi", "response": "Hello"}):
        with pytest.raises(RowError, match=r'data\.columns = \{ .*completion = "(answer|response)" \}'):
            read(row)
    with pytest.raises(RowError, match=r'data\.columns = \{ prompt = "instruction", completion = "response" \}'):
        read({"instruction": "Hi", "response": "Hello"})


def test_an_expression_makes_messages_of_any_row() -> None:
    source = "[{'role': 'user', 'content': head ~ '\\n' ~ body}, {'role': 'assistant', 'content': labels | join(', ')}]"
    row = {"head": "Sort", "body": "b a", "labels": ["a", "b"]}
    messages = [{"role": "user", "content": "Sort\nb a"}, {"role": "assistant", "content": "a, b"}]
    assert read(row, template=Expression(source)).messages == messages
    assert (
        read(row, template=Expression("{'prompt': row.head, 'completion': row.body}")).messages[0]["content"] == "Sort"
    )
    assert read(row | {"weight": 1, "system": "S"}, template=Expression(source)).messages[0]["content"] == "S"
    with pytest.raises(RowError, match='the key "other" is not known'):
        read(row | {"other": 1}, template=Expression(source))
    with pytest.raises(RowError, match=r"^a\.jsonl:3: data\.template: 'head' is undefined"):
        read({"body": "b", "labels": []}, template=Expression(source))
    with pytest.raises(RowError, match="it must give a list of messages"):
        read(row, template=Expression("head if body and labels"))
    with pytest.raises(UserError, match=r"data\.template: is no Jinja expression"):
        Expression("[{'role': ")


def test_an_expression_cannot_leave_its_sandbox() -> None:
    for source in ("''.__class__.__mro__[1].__subclasses__()", "row.update({'a': 1}) or [row]"):
        with pytest.raises(RowError, match=r"data\.template: .*(unsafe|insecure)"):
            read({"a": 1}, template=Expression(source))


def test_keys_that_are_null_are_not_there(tmp_path: Path) -> None:
    row = {"messages": [USER | {"name": None, "weight": None}, ASSISTANT], "tools": None, "weight": None}
    assert read(row).as_row() == TURNS

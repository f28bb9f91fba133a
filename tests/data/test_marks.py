"""Which turns are trained: every mark in use is honoured or refused, and none is passed over."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.findings import MarkedRow, RowError
from pipeline.data.formats import Conversation, Reading, conversation_of, read_conversations
from pipeline.data.marks import ALL
from pipeline.data.names import MARKS, MARKS_OF_NO_TRAINING, MARKS_OF_PARTS

FOUR = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


def marked(at: int, **marks: Any) -> dict[str, Any]:
    return {"messages": [turn | (marks if place == at else {}) for place, turn in enumerate(FOUR)]}


def read(row: dict[str, Any], **reading: Any) -> Conversation:
    return conversation_of(row, "a.jsonl:1", Reading(**reading))


@pytest.mark.parametrize("no", [0, 0.0, False, "0", "false"])
@pytest.mark.parametrize("key", MARKS)
def test_a_mark_of_an_answer_is_honoured(key: str, no: Any) -> None:
    assert read(marked(1, **{key: no})).trained == (3,)
    assert read(marked(0, **{key: no})).trained is None  # a question is not trained anyway
    assert read(marked(1, **{key: type(no)(1)})).trained is None if not isinstance(no, str) else True


@pytest.mark.parametrize("key", MARKS_OF_NO_TRAINING)
def test_a_mark_of_no_training_is_honoured(key: str) -> None:
    assert read(marked(1, **{key: True})).trained == (3,)
    assert read(marked(1, **{key: 0})).trained is None


def test_what_follows_the_last_trained_answer_is_cut() -> None:
    row = read(marked(3, weight=0))
    assert (row.messages, row.cut, row.trained) == (FOUR[:2], 2, None)


def test_a_row_may_mark_each_of_its_messages_and_a_system_message_moves_none() -> None:
    row = {"messages": FOUR, "loss_mask": [0, 0, 0, 1]}
    assert read(row).trained == (3,)
    assert read(row, system="Be brief.").trained == (4,)
    with pytest.raises(RowError, match=r"a\.jsonl:1: loss_mask has 2 marks for 4 messages"):
        read({"messages": FOUR, "loss_mask": [0, 1]})


@pytest.mark.parametrize("key", [*MARKS, *MARKS_OF_NO_TRAINING])
def test_a_row_that_is_marked_as_a_whole_is_left_out(key: str) -> None:
    with pytest.raises(MarkedRow, match="its own mark"):
        read({"messages": FOUR, key: key in MARKS_OF_NO_TRAINING})
    with pytest.raises(MarkedRow, match="its own mark"):
        read({"prompt": "a", "completion": "b", key: key in MARKS_OF_NO_TRAINING})
    assert read({"messages": FOUR, key: key in MARKS}).trained is None


@pytest.mark.parametrize("value", [0.5, 2, -1, "half", [1], {"a": 1}])
def test_anything_between_is_refused(value: Any) -> None:
    with pytest.raises(RowError, match=r"a\.jsonl:1: message 2: weight = .*: give 1 or 0"):
        read(marked(1, weight=value))


@pytest.mark.parametrize("key", MARKS_OF_PARTS)
def test_marks_of_parts_are_refused(key: str) -> None:
    with pytest.raises(RowError, match=rf"message 2: {key} marks parts of a text"):
        read(marked(1, **{key: [{"begin_offset": 0, "end_offset": 1, "train": False}]}))


def test_marks_that_contradict_each_other_or_ask_for_a_question_are_refused() -> None:
    with pytest.raises(RowError, match=r"contradict each other: weight \(train\), loss \(do not train\)"):
        read(marked(1, weight=1, loss=False))
    with pytest.raises(RowError, match="message 1 is the user's and marked as trained"):
        read(marked(0, train=True))


def test_train_on() -> None:
    assert read({"messages": FOUR}, train_on="last").trained == (3,)
    assert read({"messages": FOUR[:2]}, train_on="last").trained is None
    assert read({"messages": FOUR}, train_on="all").trained == ALL
    with pytest.raises(MarkedRow, match="leave no answer to train"):
        read(marked(3, weight=0), train_on="last")
    with pytest.raises(RowError, match=r'message 2 is marked as not to be trained, and data\.train_on = "all"'):
        read(marked(1, weight=0), train_on="all")


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_a_written_row_is_read_back(tmp_path: Path, train_on: str) -> None:
    row = read(marked(1, weight=0), train_on=train_on) if train_on != "all" else read({"messages": FOUR}, train_on=ALL)
    assert Conversation.from_row(json.loads(row.as_line()), row.place) == row


def test_an_ignored_mark_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(marked(1, weight=0) | {"loss": 0}) + "\n")
    (row,) = read_conversations(path, Reading(ignore=("weight", "loss")))
    assert row.trained is None

"""What a model is asked: one rule, whoever asks."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.formats import Conversation
from pipeline.data.questions import Question, asked, chosen, question_of

TOOL = {"type": "function", "function": {"name": "lamp", "parameters": {}}}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_the_last_answer_is_what_is_expected_and_all_before_it_is_asked() -> None:
    row = Conversation(turns("a", "b", "c", "d"), "t.jsonl:7", [TOOL])
    assert question_of(row) == Question(turns("a", "b", "c"), "d", [TOOL], "t.jsonl:7")


@pytest.mark.parametrize(
    ("kinds", "limit", "places"),
    [
        ("pptp", None, "013"), ("tppp", 2, "12"), ("ttt", 2, "01"), ("tttp", 2, "3"), ("ppp", 1, "0"), ("", None, ""),
    ],
)  # fmt: skip
def test_rows_with_tools_are_asked_only_where_there_are_no_others(kinds: str, limit: int | None, places: str) -> None:
    rows = [Question([], tools=[TOOL] if kind == "t" else None, place=str(at)) for at, kind in enumerate(kinds)]
    assert "".join(question.place for question in chosen(iter(rows), limit)) == places


def test_no_more_is_read_than_is_asked() -> None:
    endless = (Question([], place=str(at)) for at in itertools.count())
    assert len(chosen(endless, 3)) == 3


def test_the_test_data_is_asked_else_what_else_there_is(tmp_path: Path) -> None:
    assert asked(tmp_path, None) == []
    write(tmp_path / "train.jsonl", {"messages": turns("train", "x")}, {"messages": turns("more", "x")})
    (tmp_path / "validation.jsonl").touch()
    assert [question.messages[0]["content"] for question in asked(tmp_path, None)] == ["train", "more"]
    write(tmp_path / "validation.jsonl", {"messages": turns("validation", "x"), "tools": [TOOL]})
    assert asked(tmp_path, 1) == [Question(turns("validation"), "x", [TOOL], f"{tmp_path}/validation.jsonl:1")]
    write(tmp_path / "test.jsonl", {"messages": turns("test", "x")})
    assert [question.messages[0]["content"] for question in asked(tmp_path, None)] == ["test"]
    (tmp_path / "test.jsonl").unlink()
    assert asked(tmp_path, None, ("test",)) == []

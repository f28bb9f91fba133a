"""Conversations from the rows that people have: many shapes of a row come in, one goes out.

Every row becomes `messages`, a list of {"role", "content"}, or is a whole text. What cannot become that is refused
with its file and line, and so is a key that nobody reads: what is lost in silence is data that was paid for and not
trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.data.expression import Expression
from pipeline.data.findings import MarkedRow, RowError
from pipeline.data.marks import ALL, Trained, take_list_of_marks, take_mark, trained
from pipeline.data.messages import (
    Message,
    functions_of,
    json_of,
    messages_of,
    refuse_unknown,
    said,
    take_reasoning,
    text,
    tools_of,
)
from pipeline.data.names import LIKELY_ANSWERS, LIKELY_QUESTIONS, PREFERENCES
from pipeline.data.sources import rows_of
from pipeline.errors import UserError

SHAPES = {
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    "alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
    "prompt": '{"prompt": "...", "completion": "..."}',
    "text": '{"text": "..."}',
}
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# Beside a shape's own keys, what every row may have.
_MARKS = ("weight", "train", "loss", "loss_mask")
_COMMON = ("system", "tools", "functions", *_MARKS)
_OWN = {
    "messages": ("messages", "conversations"),
    "sharegpt": ("messages", "conversations"),
    "alpaca": ("instruction", "input", "output", "history", "reasoning_content"),
    "prompt": ("prompt", "completion", "reasoning_content"),
}


@dataclass(frozen=True)
class Reading:
    """How rows are read; the keys of [data] by the same names.

    Attributes:
        format: a key of SHAPES, or "auto" to look at each row.
        system: the system message for rows that have none.
        ignore: keys that are left aside.
        columns: the row's own names of known keys: {"completion": "response"}.
        template: an expression that makes messages or a row of a row; None for none.
        train_on: "assistant", "last" or "all".
        group: the key whose value says which rows belong together.
    """

    format: str = "auto"
    system: str | None = None
    ignore: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    template: Expression | None = None
    train_on: Literal["assistant", "last", "all"] = "assistant"
    group: str | None = None


@dataclass(frozen=True)
class Conversation:
    """One row.

    Attributes:
        messages: {"role", "content"}, and where given "name", "tool_calls", "tool_call_id",
            "reasoning_content". The last one is the last that is trained.
        place: "file:line", for messages to the user.
        tools: JSON schemas of the tools that the model may call; None for none.
        cut: how many messages after the last trained one were left off: nothing in them can be trained.
        trained: which messages are trained; None for every answer.
        group: what it belongs to; None where rows stand alone.
        text: of a row that is a whole text, which is trained to its end: it has no messages. None for a conversation.
    """

    messages: list[Message]
    place: str
    tools: list[dict[str, Any]] | None = None
    cut: int = 0
    trained: Trained = None
    group: str | None = None
    text: str | None = None

    @property
    def asked(self) -> str:
        """What the user says in it; of a whole text, all of it."""
        said_by_user = (message["content"] for message in self.messages if message["role"] == "user")
        return " ".join(said_by_user) if self.text is None else self.text

    @property
    def whole(self) -> str:
        """All that is said in it."""
        return " ".join(message["content"] for message in self.messages) if self.text is None else self.text

    @property
    def answer(self) -> str:
        """The last answer; "" for a whole text."""
        return str(self.messages[-1]["content"]) if self.text is None else ""

    def as_row(self) -> dict[str, Any]:
        """The row as it is written to JSONL."""
        if self.text is not None:
            return {"text": self.text}
        return (
            {"messages": self.messages}
            | ({"tools": self.tools} if self.tools else {})
            | ({"trained": self.trained if self.trained == ALL else list(self.trained)} if self.trained else {})
        )

    def as_line(self) -> str:
        """The same as a line of JSONL."""
        return _compact(self.as_row()) + "\n"

    @staticmethod
    def from_row(row: Mapping[str, Any], place: str) -> Conversation:
        """A row that `as_row` made."""
        marked = row.get("trained")
        chosen: Trained = ALL if marked == ALL else tuple(marked) if marked else None
        return Conversation(row.get("messages", []), place, row.get("tools"), trained=chosen, text=row.get("text"))


def conversations(path: Path, reading: Reading = Reading()) -> Iterator[tuple[str, Conversation | UserError]]:
    """Every row of a file with its place: the conversation, or what is wrong with the row.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    for place, row in rows_of(path):
        try:
            yield place, conversation_of(row, place, reading)
        except UserError as error:
            yield place, error


def read_conversations(path: Path, reading: Reading = Reading()) -> list[Conversation]:
    """All rows of a file.

    Raises:
        UserError: the file or a row in it cannot be used: where, why, what is allowed.
    """
    found = []
    for _, row in conversations(path, reading):
        if isinstance(row, UserError):
            raise row
        found.append(row)
    if not found:
        raise no_rows(path)
    return found


def no_rows(path: Path) -> UserError:
    """The message for a file without rows."""
    return UserError(f"{path}: holds no rows; write one conversation a line, e.g. {SHAPES['messages']}")


def conversation_of(row: Any, place: str, reading: Reading) -> Conversation:
    """The conversation that a row holds.

    Raises:
        MarkedRow: its own marks say that nothing of it is trained.
        RowError: it cannot be used, or holds what would be lost.
    """
    if isinstance(row, UserError):
        raise row
    shape = reading.format
    if not isinstance(row, dict):
        raise RowError(
            "no object", f"{place}: must be a JSON object, e.g. {SHAPES['messages' if shape == 'auto' else shape]}"
        )
    fields = {key: value for key, value in row.items() if value is not None and key not in reading.ignore}
    group = fields.pop(reading.group, None) if reading.group else None
    if reading.group and group is None:
        raise RowError("no group", f'{place}: has no "{reading.group}", which data.group names')
    if reading.template is not None:
        fields = reading.template.apply(fields, place)
    fields = _renamed(fields, reading.columns, place)
    _refuse_preferences(fields, place)
    found = _shape_of(fields)
    if found is None or shape not in ("auto", found):
        raise RowError("unknown shape", f"{place}: {_not_a_shape(fields, shape)}")
    belongs_to = None if group is None else json.dumps(group, sort_keys=True)
    if found == "text":
        return replace(_whole_text(fields, place), group=belongs_to)
    messages = _turns(fields, found, place, reading)
    marks = take_list_of_marks(fields, len(messages), place)
    if marks is not None:
        messages = [(message, mark) for (message, _), mark in zip(messages, marks, strict=True)]
    own = text(fields.pop("system", ""), f"{place}: system") or reading.system
    if own and not any(message["role"] == "system" for message, _ in messages):
        messages.insert(0, said("system", own))
    mark = take_mark(fields, place)
    tools = tools_of(fields.pop("tools", None), place)
    older = functions_of(fields.pop("functions", None), place)
    refuse_unknown(fields, place, (*_OWN[found], *_COMMON))
    turns = [message for message, _ in messages]
    _check_answers(turns, place)
    chosen = trained([turn["role"] for turn in turns], [mark for _, mark in messages], mark, reading.train_on, place)
    return _cut(turns, tools or older, chosen, place, belongs_to)


def _whole_text(fields: dict[str, Any], place: str) -> Conversation:
    content = text(fields.pop("text"), f"{place}: text")
    if take_mark(fields, place) is False:
        raise MarkedRow(f"{place}: its own mark says that it is not trained")
    refuse_unknown(fields, place, ("text", *_MARKS))
    if not content.strip():
        raise RowError("an empty text", f"{place}: the text is empty; remove the row or fill it")
    return Conversation([], place, text=content)


def _renamed(fields: dict[str, Any], columns: Mapping[str, str], place: str) -> dict[str, Any]:
    names = {own: known for known, own in columns.items()}
    renamed: dict[str, Any] = {}
    for key, value in fields.items():
        name = names.get(key, key)
        if name in renamed:
            raise RowError(
                f'two columns for "{name}"',
                f'{place}: data.columns reads "{columns[name]}" as "{name}", and the row has "{name}" too: list the '
                "one that is not wanted in data.ignore",
            )
        renamed[name] = value
    return renamed


def _refuse_preferences(fields: dict[str, Any], place: str) -> None:
    found = [key for key in PREFERENCES if key in fields]
    if not found and {"prompt", "completion", "label"} <= fields.keys():
        found = ["label"]
    if found:
        raise RowError(
            "preference data",
            f"{place}: is a row of preference data (its keys: {', '.join(map(str, fields))}), which says which of two "
            "answers is better; trained is one answer a row. To train the better one alone, name its column in "
            f"data.columns and list the other in data.ignore, e.g. columns = {{ completion = {_quoted('chosen')} }}, "
            f"ignore = [{_quoted('rejected')}]",
        )


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _not_a_shape(fields: dict[str, Any], shape: str) -> str:
    words = f"has the keys {', '.join(map(str, fields)) or '(none)'}; wanted is "
    words += " or ".join(SHAPES.values()) if shape == "auto" else f"{SHAPES[shape]} (data.format = {shape!r})"
    question = next((key for key in LIKELY_QUESTIONS if key in fields), None)
    answer = next((key for key in LIKELY_ANSWERS if key in fields and key != question), None)
    if shape == "auto" and question and answer:
        return f"{words}. {_advice(question, answer)}"
    return words


def _advice(question: str, answer: str) -> str:
    names = {"prompt": question, "completion": answer}
    columns = ", ".join(f"{known} = {_quoted(own)}" for known, own in names.items() if own != known)
    return f"Should {question} be asked and {answer} be answered: data.columns = {{ {columns} }}"


def _shape_of(fields: dict[str, Any]) -> str | None:
    for key in ("messages", "conversations"):
        if (turns := fields.get(key)) is not None:
            sharegpt = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]
            return "sharegpt" if sharegpt else "messages"
    if "instruction" in fields:
        return "alpaca"
    return next((shape for shape in ("prompt", "text") if shape in fields), None)


def _turns(fields: dict[str, Any], shape: str, place: str, reading: Reading) -> list[tuple[Message, bool | None]]:
    """The messages of a row, whose own keys are taken out of the fields."""
    if shape in ("messages", "sharegpt"):
        turns = fields.pop("messages" if "messages" in fields else "conversations")
        return messages_of(turns, place, reading.ignore)
    if shape == "alpaca":
        question = text(fields.pop("instruction"), f"{place}: instruction")
        if addition := text(fields.pop("input", ""), f"{place}: input"):
            question = f"{question}\n\n{addition}"
        history = _history(fields.pop("history", None), place)
        return [*history, said("user", question), _answer(fields, "instruction", "output", place)]
    if isinstance(fields["prompt"], list):
        asked = messages_of(fields.pop("prompt"), place, reading.ignore)
        return [*asked, *messages_of(fields.pop("completion", None), place, reading.ignore)]
    return [
        said("user", text(fields.pop("prompt"), f"{place}: prompt")),
        _answer(fields, "prompt", "completion", place),
    ]


def _answer(fields: dict[str, Any], question: str, key: str, place: str) -> tuple[Message, None]:
    reasoning = take_reasoning(fields, place)
    if key not in fields and (other := next((name for name in LIKELY_ANSWERS if name in fields), None)):
        raise RowError(
            "no text", f'{place}: {key}: the text is missing, and "{other}" is not read. {_advice(question, other)}'
        )
    message, _ = said("assistant", text(fields.pop(key, None), f"{place}: {key}"))
    return message | ({"reasoning_content": reasoning} if reasoning else {}), None


def _history(history: Any, place: str) -> list[tuple[Message, None]]:
    """Alpaca's earlier turns: a list of [question, answer]."""
    if isinstance(history, str) and history.strip():
        history = json_of(history, place, "history")
    if not history:
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("history cannot be read", f'{place}: history must be a list of ["question", "answer"]')
    return [
        said(role, text(words, f"{place}: history {number}"))
        for number, pair in enumerate(history, 1)
        for role, words in zip(("user", "assistant"), pair, strict=True)
    ]


def _check_answers(messages: list[Message], place: str) -> None:
    """A conversation has an answer after a question, and no empty one."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(message["role"] for message in messages)
        raise RowError(
            "no answer", f"{place}: has no assistant turn (its roles: {roles}), so there is nothing to train"
        )
    if answers[-1] == 0:
        raise RowError("no question", f"{place}: has an answer and no question before it")
    for index in answers:
        if not messages[index]["content"].strip() and not messages[index].get("tool_calls"):
            raise RowError(
                "an empty answer",
                f"{place}: message {index + 1}: the assistant's answer is empty; remove the row or fill it",
            )


def _cut(
    messages: list[Message], tools: list[dict[str, Any]] | None, chosen: Trained, place: str, group: str | None
) -> Conversation:
    """The conversation up to its last trained answer."""
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant" and at > 0]
    last = chosen[-1] if isinstance(chosen, tuple) else answers[-1]
    kept = messages[: last + 1]
    if isinstance(chosen, tuple) and list(chosen) == [at for at in answers if at <= last]:
        chosen = None
    return Conversation(kept, place, tools, len(messages) - len(kept), chosen, group)

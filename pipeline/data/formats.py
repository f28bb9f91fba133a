"""Conversations from the files that people have: four shapes of a row come in, one goes out.

Every row becomes `messages`, a list of {"role", "content"}. What cannot become that is refused with its file
and line, since a row that is skipped in silence is data that was paid for and not trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.sources import parse_json, rows_of
from pipeline.errors import UserError

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
SHAPES = {
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    "alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
    "prompt": '{"prompt": "...", "completion": "..."}',
}
# Beside role and content, what a chat template can make use of.
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class Conversation:
    """One row.

    Attributes:
        messages: {"role", "content"}, and where given "name", "tool_calls", "tool_call_id",
            "reasoning_content". The last one is the assistant's.
        place: "file:line", for messages to the user.
        tools: JSON schemas of the tools that the model may call; None for none.
        cut: how many messages after the last assistant's were left off: nothing in them can be trained.
    """

    messages: list[Message]
    place: str
    tools: list[dict[str, Any]] | None = None
    cut: int = 0

    def as_row(self) -> dict[str, Any]:
        """The row as it is written to JSONL."""
        return {"messages": self.messages} | ({"tools": self.tools} if self.tools else {})


def read_conversations(path: Path, shape: str = "auto", system: str | None = None) -> list[Conversation]:
    """Read a data file.

    Args:
        path: .jsonl (or .ndjson), .json (an array, or lines), .csv or .parquet.
        shape: a key of SHAPES, or "auto" to look at each row.
        system: the system message for rows that have none.

    Raises:
        UserError: the file or a row in it cannot be used: where, why, what is allowed.
    """
    conversations = [_conversation(row, place, shape, system) for place, row in rows_of(path)]
    if not conversations:
        raise UserError(f"{path}: holds no rows; write one conversation a line, e.g. {SHAPES['messages']}")
    return conversations


def _conversation(row: Any, place: str, shape: str, system: str | None) -> Conversation:
    if not isinstance(row, dict):
        raise UserError(f"{place}: must be a JSON object, e.g. {SHAPES['messages' if shape == 'auto' else shape]}")
    found = _shape_of(row)
    if found is None or shape not in ("auto", found):
        wanted = " or ".join(SHAPES.values()) if shape == "auto" else f"{SHAPES[shape]} (data.format = {shape!r})"
        raise UserError(f"{place}: has the keys {', '.join(map(str, row)) or '(none)'}; wanted is {wanted}")
    if found in ("messages", "sharegpt"):
        messages = _messages(row["messages"] if row.get("messages") is not None else row["conversations"], place)
    elif found == "alpaca":
        question = _text(row["instruction"], f"{place}: instruction")
        if addition := _text(row.get("input") or "", f"{place}: input"):
            question = f"{question}\n\n{addition}"
        messages = [_said("user", question), _said("assistant", _text(row.get("output"), f"{place}: output"))]
    elif isinstance(row["prompt"], list):
        messages = [*_messages(row["prompt"], place), *_messages(row.get("completion"), place)]
    else:
        messages = [
            _said("user", _text(row["prompt"], f"{place}: prompt")),
            _said("assistant", _text(row.get("completion"), f"{place}: completion")),
        ]
    own = _text(row.get("system") or "", f"{place}: system") or system
    if own and not any(message["role"] == "system" for message in messages):
        messages.insert(0, _said("system", own))
    return _checked(messages, _tools(row.get("tools"), place), place)


def _shape_of(row: dict[str, Any]) -> str | None:
    for key in ("messages", "conversations"):
        if (turns := row.get(key)) is not None:
            sharegpt = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]
            return "sharegpt" if sharegpt else "messages"
    if "instruction" in row:
        return "alpaca"
    return "prompt" if "prompt" in row else None


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _messages(turns: Any, place: str) -> list[Message]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse_json(turns, place)  # a cell of a CSV file
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{place}: the messages must be a list with at least one question and one answer")
    return [_message(turn, f"{place}: message {number}") for number, turn in enumerate(turns, 1)]


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f'{place}: must be an object: {{"role": "user", "content": "..."}}')
    said = turn.get("from", turn.get("role"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise UserError(f"{place}: unknown role {said!r}; known are: {', '.join(ROLES)}")
    for key in ("weight", "train", "training"):
        if turn.get(key) in (0, "0", False):
            raise UserError(
                f"{place}: {key} = {turn[key]!r}: every assistant turn is trained; make a row of its own for "
                "each conversation that ends in a turn to train"
            )
    message = {"role": role} | {key: turn[key] for key in _KEPT if turn.get(key) is not None}
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], place)
    content = turn.get("value" if "from" in turn else "content")
    if content is None and message.get("tool_calls"):
        content = ""
    return {"role": role, "content": _text(content, place), **message}


def _text(content: Any, place: str) -> str:
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        what = "is missing" if content is None else f"is {type(content).__name__}"
        raise UserError(f"{place}: the text {what}; give a string (an answer that is JSON too: as one string)")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        character = f"\\u{ord(content[error.start]):04x}"
        raise UserError(f"{place}: holds half a surrogate pair ({character}), which is no character") from None
    return content


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls whose arguments are objects, as chat templates want them; the OpenAI API writes them as a
    string."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{place}: tool_calls must be a list of objects")
    opened = []
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function = function | {"arguments": parse_json(function["arguments"], f"{place}: tool_calls")}
        opened.append(call | {"function": function} if "function" in call else function)
    return opened


def _tools(tools: Any, place: str) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools, f"{place}: tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{place}: tools must be a list of JSON schemas")
    return tools


def _checked(messages: list[Message], tools: list[dict[str, Any]] | None, place: str) -> Conversation:
    """A conversation that ends with an answer, and has no empty one."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{place}: has no assistant turn (its roles: {roles}), so there is nothing to train")
    if answers[-1] == 0:
        raise UserError(f"{place}: has an answer and no question before it")
    for index in answers:
        if not messages[index]["content"].strip() and not messages[index].get("tool_calls"):
            raise UserError(f"{place}: message {index + 1}: the assistant's answer is empty; remove the row or fill it")
    kept = messages[: answers[-1] + 1]
    return Conversation(kept, place, tools, len(messages) - len(kept))

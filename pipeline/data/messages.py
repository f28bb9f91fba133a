"""One message, and the tools that a row offers, from every spelling in use.

Every key is read or refused by name: a function here takes what it knows out of a copy of the fields, and what is left
at the end was never read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from pipeline.data.findings import RowError
from pipeline.data.marks import take_mark
from pipeline.data.names import CALLS, IMAGES_AND_SOUND, MARKS, REASONING, ROLES
from pipeline.data.sources import parse_json
from pipeline.errors import UserError

Message = dict[str, Any]
_EXAMPLE = '{"role": "user", "content": "..."}'
# The order of a tool's schema, as most write it.
_KEYWORDS = ("type", "function", "name", "description", "parameters", "properties", "items", "enum", "required")
_REASONING = frozenset(REASONING)
_KNOWN = ("role", "content", "from", "value", "name", "tool_calls", "tool_call_id", "function_call", *REASONING, *MARKS)


def messages_of(turns: Any, place: str, ignored: Collection[str]) -> list[tuple[Message, bool | None]]:
    """The messages of a list, each with its mark.

    Args:
        turns: the list; a text that holds one as JSON, as a cell of a CSV file does, is opened.
        place: the row's.
        ignored: keys that are left aside.

    Raises:
        RowError: one cannot be used.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = json_of(turns, place, "messages")
    if not isinstance(turns, list) or not turns:
        raise RowError("no messages", f"{place}: the messages must be a list with at least one question and one answer")
    return [_message(turn, f"{place}: message {number}", ignored) for number, turn in enumerate(turns, 1)]


def said(role: str, content: str) -> tuple[Message, None]:
    """A message of a text alone, which has no mark."""
    return {"role": role, "content": content}, None


def _message(turn: Any, place: str, ignored: Collection[str]) -> tuple[Message, bool | None]:
    if not isinstance(turn, dict):
        raise RowError("not a message", f"{place}: must be an object: {_EXAMPLE}")
    fields = {key: value for key, value in turn.items() if value is not None and key not in ignored}
    sharegpt = "from" in fields
    called = fields.pop("from" if sharegpt else "role", None)
    spoken = called.strip().casefold() if isinstance(called, str) else None
    if spoken is None or (role := ROLES.get(spoken)) is None:
        raise RowError("unknown role", f"{place}: unknown role {called!r}; known are: {', '.join(ROLES)}")
    mark = take_mark(fields, place)
    content = fields.pop("value" if sharegpt else "content", None)
    message: Message = {"role": role, "content": content}
    if (name := fields.pop("name", None)) not in (None, ""):
        message["name"] = text(name, f"{place}: name")
    calls = _calls(fields, place)
    if spoken in CALLS:
        calls, message["content"] = [*calls, *_spoken_calls(content, place)], ""
    if calls:
        message["tool_calls"] = calls
        if message["content"] is None:
            message["content"] = ""
    if (answered := fields.pop("tool_call_id", None)) not in (None, ""):
        message["tool_call_id"] = text(answered, f"{place}: tool_call_id")
    if reasoning := take_reasoning(fields, place):
        message["reasoning_content"] = reasoning
    message["content"] = text(message["content"], place)
    refuse_unknown(fields, place, _KNOWN)
    return message, mark


def take_reasoning(fields: dict[str, Any], place: str) -> str:
    """The reasoning before an answer under any of its names, "" for none; its keys are taken out of the fields."""
    if _REASONING.isdisjoint(fields):  # as in most
        return ""
    found = {key: text(fields.pop(key), f"{place}: {key}") for key in REASONING if fields.get(key) not in (None, "")}
    for key in REASONING:
        fields.pop(key, None)
    if len(set(found.values())) > 1:
        raise RowError("two reasonings", f"{place}: {' and '.join(found)} differ: an answer has one reasoning")
    return next(iter(found.values()), "")


def refuse_unknown(fields: dict[str, Any], place: str, known: Iterable[str]) -> None:
    """Refuse what is left of a row or a message, unless it holds nothing.

    Raises:
        RowError: a key was not read.
    """
    for key, value in fields.items():
        if value is None or (isinstance(value, str | list | dict) and not value):
            continue
        if key in IMAGES_AND_SOUND:
            raise RowError(
                f'"{key}" is not trained',
                f'{place}: has "{key}", and only texts are trained: leave such rows out, or list "{key}" in '
                "data.ignore to train their texts alone",
            )
        raise RowError(
            f'unknown key "{key}"',
            f'{place}: the key "{key}" is not known and would be lost; known are: {", ".join(known)}. Name it in '
            "data.columns, or list it in data.ignore",
        )


def text(content: Any, place: str) -> str:
    """A text, also one that is given in parts.

    Raises:
        RowError: it is none, or a part of it is no text.
    """
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        content = "".join(_part(part, f"{place}: part {number}") for number, part in enumerate(content, 1))
    if not isinstance(content, str):
        what = "is missing" if content is None else f"is {type(content).__name__}"
        raise RowError(
            "no text", f"{place}: the text {what}; give a string (an answer that is JSON too: as one string)"
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        character = f"\\u{ord(content[error.start]):04x}"
        raise RowError(
            "half a character", f"{place}: holds half a surrogate pair ({character}), which is no character"
        ) from None
    return content


def _part(part: dict[str, Any], place: str) -> str:
    fields = {key: value for key, value in part.items() if value is not None}
    kind = fields.pop("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise RowError(f'"{kind}" is not trained', f'{place}: is of the type "{kind}", and only texts are trained')
    content = fields.pop("text", None)
    refuse_unknown(fields, place, ("type", "text"))
    if not isinstance(content, str):
        raise RowError("no text", f"{place}: its text must be a string")
    return content


def json_of(source: str, place: str, what: str) -> Any:
    """The value of a text that holds JSON.

    Raises:
        RowError: it holds none.
    """
    try:
        return parse_json(source, f"{place}: {what}")
    except UserError as error:
        raise RowError(f"{what}: not JSON", str(error)) from None


def _calls(fields: dict[str, Any], place: str) -> list[dict[str, Any]]:
    calls = fields.pop("tool_calls", None) or []
    if isinstance(calls, str):
        calls = json_of(calls, place, "tool_calls")
    if not isinstance(calls, list):
        raise RowError("tool_calls cannot be read", f"{place}: tool_calls must be a list of objects")
    if single := fields.pop("function_call", None):
        calls = [*calls, json_of(single, place, "function_call") if isinstance(single, str) else single]
    return [_call(call, place) for call in calls]


def _spoken_calls(content: Any, place: str) -> list[dict[str, Any]]:
    """The calls that are a ShareGPT turn's whole text."""
    calls = json_of(text(content, place), place, "the call")
    return [_call(call, place) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any, place: str) -> dict[str, Any]:
    """A call whose arguments are an object, as chat templates want it; the OpenAI API writes them as a string."""
    if not isinstance(call, dict):
        raise RowError("tool_calls cannot be read", f"{place}: tool_calls must be a list of objects")
    fields = {key: value for key, value in call.items() if value is not None}
    opened = {key: fields.pop(key) for key in ("id", "type") if key in fields}
    function = fields.pop("function", None)
    if function is None:
        function, fields = fields, {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("tool_calls cannot be read", f"{place}: a call of a tool must name its function")
    function = dict(function)
    name, arguments = function.pop("name"), function.pop("arguments", None)
    if isinstance(arguments, str):
        arguments = json_of(arguments, place, "tool_calls") if arguments.strip() else {}
    refuse_unknown(fields, f"{place}: a call of a tool", ("id", "type", "function"))
    refuse_unknown(function, f"{place}: a call's function", ("name", "arguments"))
    return opened | {"function": {"name": name, "arguments": {} if arguments is None else arguments}}


def tools_of(tools: Any, place: str) -> list[dict[str, Any]] | None:
    """The schemas of the tools that a row offers; None for none.

    Raises:
        RowError: they are no JSON schemas.
    """
    if isinstance(tools, str) and tools.strip():
        tools = json_of(tools, place, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools cannot be read", f"{place}: tools must be a list of JSON schemas")
    return [_in_order(tool) for tool in tools]


def _in_order(schema: Any) -> Any:
    """A schema whose keywords stand in one order: Arrow keeps one for all rows, whatever each of them had."""
    if isinstance(schema, list):
        return [_in_order(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    keys = sorted(schema, key=lambda key: (_KEYWORDS.index(key) if key in _KEYWORDS else len(_KEYWORDS), key))
    return {
        # Parameters stand as the user has them.
        key: {name: _in_order(item) for name, item in schema[key].items()}
        if key == "properties" and isinstance(schema[key], dict)
        else _in_order(schema[key])
        for key in keys
    }


def functions_of(functions: Any, place: str) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's older spelling: the schemas of functions alone."""
    found = tools_of(functions, place)
    return [{"type": "function", "function": function} for function in found] if found else None

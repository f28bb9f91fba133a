"""What a chat template leaves out of a row: tools, calls, results, reasoning, names, or a whole message.

A template is a program that may look at any part of a conversation and at none. What is not in its text is not trained,
and no later check can miss it. So every part is looked for in the text, as it is or as JSON writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.data.formats import Conversation
from pipeline.data.marks import ALL
from pipeline.prompt.labels import TrainingText


def left_out(row: Conversation, texts: Sequence[TrainingText]) -> Iterator[tuple[str, str]]:
    """What of a row is in none of its training texts.

    Args:
        row: the conversation.
        texts: its training texts.

    Yields:
        What kind of part it is ("tools"), and which ("the tool 'light'").
    """
    whole = "\n".join(text.text for text in texts)
    asked = whole if row.trained == ALL or not row.tools else "\n".join(_untrained(text) for text in texts)
    for tool in row.tools or ():
        function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
        assert isinstance(function, dict)
        if any(not _in(part, asked) for part in _words_of_schema(function)):
            yield "tools", f"the tool {function.get('name')!r}"
    for number, message in enumerate(row.messages, 1):
        where = f"message {number}"
        if not _content_in(message["content"], whole):
            kind = "tool results" if message["role"] == "tool" else f"{message['role']} messages"
            yield kind, f"the text of {where}"
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if not all(_in(part, whole) for part in (function["name"], *_leaves(function["arguments"]))):
                yield "tool calls", f"the call of {function['name']!r} in {where}"
        if not _in(message.get("name", ""), whole):
            yield "names", f"the name {message['name']!r} of {where}"
        # Templates drop the reasoning of earlier turns by design; what is trained has its own text.
        chosen = row.trained in (None, ALL) or number - 1 in (row.trained or ())
        if chosen and number > 1 and not _content_in(message.get("reasoning_content", ""), whole):
            yield "reasoning", f"the reasoning of {where}"


def _untrained(text: TrainingText) -> str:
    parts, at = [], 0
    for start, end in text.spans:
        parts.append(text.text[at:start])
        at = end
    return "".join((*parts, text.text[at:]))


def _content_in(content: str, text: str) -> bool:
    # A template may take an answer apart at its thinking and write both in its own way.
    return _in(content, text) or ("</think>" in content and _in(content.rpartition("</think>")[2], text))


def _in(part: Any, text: str) -> bool:
    """Whether a value is in a text: as it is, or as JSON or Python write it."""
    if not isinstance(part, str):
        return json.dumps(part) in text or str(part) in text
    part = part.strip()
    return part in text or any(json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def _words_of_schema(function: dict[str, Any]) -> Iterator[str]:
    """What of a tool's schema every template has to write: names and descriptions."""
    for key in ("name", "description"):
        if isinstance(function.get(key), str):
            yield function[key]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    for name, schema in properties.items() if isinstance(properties, dict) else ():
        yield name
        if isinstance(schema, dict) and isinstance(schema.get("description"), str):
            yield schema["description"]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value

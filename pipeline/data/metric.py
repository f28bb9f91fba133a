"""Is an answer right? One function, the same for every rung of the ladder."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any


def score(metric: str, answer: str, expected: str) -> bool:
    """Compare an answer with the expected one.

    Args:
        metric: "json": both parse to the same JSON value, whatever the order of keys and the white space;
            "text": equal but for white space around them.
        answer: what the model wrote.
        expected: what the row says.

    Raises:
        ValueError: the metric is "none" or unknown: then nothing can be scored.
    """
    if metric == "text":
        return answer.strip() == expected.strip()
    if metric != "json":
        raise ValueError(f"the metric {metric!r} gives no score")
    try:
        return _equal(parse_strict(answer), parse_strict(expected))
    except ValueError:
        return False


def parse_strict(text: str) -> Any:
    """Parse one JSON value: no duplicate keys, no NaN or Infinity, nothing after it. Numbers become Decimals.

    Raises:
        ValueError: it is not that.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse,
            parse_int=Decimal,
            parse_float=Decimal,
        )
    except (RecursionError, ArithmeticError) as error:
        raise ValueError(f"not JSON that can be read: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice in an object")
    return dict(pairs)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _equal(left: Any, right: Any) -> bool:
    """Equality in which true is not 1."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(value, right[key]) for key, value in left.items())
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)

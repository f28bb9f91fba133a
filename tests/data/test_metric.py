"""When an answer counts as right."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.metric import score

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(VALUES)
def test_json_is_right_however_it_is_laid_out(value: object) -> None:
    assert score("json", f"\n {json.dumps(value, indent=1)} ", json.dumps(value, sort_keys=True))


@given(VALUES, VALUES)
def test_json_agrees_with_canonical_text(left: object, right: object) -> None:
    same = json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)
    if same:
        assert score("json", json.dumps(left), json.dumps(right))
    elif not _has_number(left):
        assert not score("json", json.dumps(left), json.dumps(right))


def _has_number(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_number, value.values()))
    if isinstance(value, list):
        return any(map(_has_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ('{"a":1,"b":2}', '{"b": 2, "a": 1.0}', True),
        ("1e2", "100", True),
        ('{"a":true}', '{"a":1}', False),
        ('{"a":"1"}', '{"a":1}', False),
        ('{"a":null}', "{}", False),
        ('{"a":1,"a":1}', '{"a":1}', False),
        ('{"a":1} ', '{"a":1}', True),
        ('{"a":1}.', '{"a":1}', False),
        ('{"a":1}{"a":1}', '{"a":1}', False),
        ('Sure: {"a":1}', '{"a":1}', False),
        ("[1,2]", "[2,1]", False),
        ("NaN", "NaN", False),
        ("-Infinity", "-Infinity", False),
        ("", "", False),
        ("[" * 100_000, "[]", False),
        ("1" * 10_000, "1" * 10_000, True),
        ("1e99999999999999999999", "1", False),
        ("{'a':1}", '{"a":1}', False),
    ],
)
def test_json_cases(answer: str, expected: str, right: bool) -> None:
    assert score("json", answer, expected) is right


@pytest.mark.parametrize(
    ("answer", "expected", "right"), [(" yes\n", "yes", True), ("Yes", "yes", False), ("ye s", "yes", False)]
)
def test_text(answer: str, expected: str, right: bool) -> None:
    assert score("text", answer, expected) is right


@pytest.mark.parametrize("metric", ["none", "bleu"])
def test_no_score(metric: str) -> None:
    with pytest.raises(ValueError, match="no score"):
        score(metric, "a", "a")


def test_large_numbers_are_compared_exactly() -> None:
    assert not score("json", "9007199254740993", "9007199254740992")
    assert math.isclose(0.1 + 0.2, 0.3)
    assert not score("json", str(0.1 + 0.2), "0.3")

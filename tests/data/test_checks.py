"""Checks over a whole data set, against the plain definitions."""

import pytest

from pipeline.data.checks import Seen, check_expected, identity_of
from pipeline.data.formats import Conversation
from pipeline.errors import UserError
from pipeline.prompt.labels import IGNORED, Tokenized
from pipeline.prompt.lengths import fit


def row(question: str, answer: str = "ok", place: str = "a.jsonl:1") -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], place)


def test_only_exact_repetitions_are_dropped_and_the_first_stays() -> None:
    rows = [row("a", place="1"), row("b", place="2"), row("a", place="3"), row("a", "other", place="4")]
    rows.append(Conversation(rows[0].messages, "5", tools=[{"name": "t"}]))
    seen = Seen()
    assert [seen.repeated(identity_of(kept, 0), kept.place) for kept in rows] == [None, None, "1", None, None]


def test_another_answer_to_the_same_question_is_found_with_its_place() -> None:
    seen = Seen()
    rows = [row("a", "x", "1"), row("a", "x", "2"), row("a", "y", "3"), row("A", "y", "4")]
    assert [seen.contradicted(identity_of(kept, 0), kept.place) for kept in rows] == [None, None, "1", None]


def sequence(prompt: int, answer: int) -> Tokenized:
    ids = list(range(prompt + answer))
    return Tokenized(ids, [IGNORED] * prompt + ids[prompt:])


def test_a_row_that_fits_is_untouched() -> None:
    assert fit(sequence(3, 5), 8, "error", "a:1") == sequence(3, 5)


def test_a_row_that_is_too_long_is_an_error_dropped_or_cut() -> None:
    with pytest.raises(UserError, match=r"^a:1: has 9 tokens, train\.max_length is 8: raise it"):
        fit(sequence(3, 6), 8, "error", "a:1")
    assert fit(sequence(3, 6), 8, "drop", "a:1") is None
    cut = fit(sequence(3, 6), 8, "truncate", "a:1")
    assert cut is not None
    assert (cut.input_ids, cut.trained) == (list(range(8)), 5)


def test_a_row_of_which_nothing_would_be_trained_is_an_error() -> None:
    with pytest.raises(UserError, match="its question alone fills"):
        fit(sequence(8, 3), 8, "truncate", "a:1")
    with pytest.raises(UserError, match="it has no answer"):
        fit(sequence(5, 0), 8, "error", "a:1")
    with pytest.raises(UserError, match="no token of it would be trained"):
        fit(Tokenized([1, 2], [1, IGNORED]), 8, "error", "a:1")  # the first token is predicted from nothing


def test_expected_answers_must_fit_the_metric() -> None:
    rows = [row("a", '{"a": 1}'), row("b", "{'a': 1}", "t.jsonl:2")]
    check_expected(rows, "text")
    check_expected(rows[:1], "json")
    with pytest.raises(UserError, match=r't\.jsonl:2: eval\.metric is "json"'):
        check_expected(rows, "json")

"""Intervals and tests of shares of right answers, against values that are known."""

import pytest

from pipeline.verify.statistics import mcnemar, wilson_interval


@pytest.mark.parametrize(
    ("correct", "asked", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # R. G. Newcombe, 1998, "Two-sided confidence intervals", table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_of_a_share(correct: int, asked: int, low: float, high: float) -> None:
    assert wilson_interval(correct, asked) == pytest.approx((low, high), abs=5e-5)


def test_answers_that_changed() -> None:
    before, after = [True] * 12 + [False] * 8, [True] * 4 + [False] * 14 + [True] * 2
    lost, won, p = mcnemar(before, after)
    assert (lost, won) == (8, 2)
    assert p == pytest.approx(2 * sum((1, 10, 45)) / 2**10)
    assert mcnemar([True], [True]) == (0, 0, 1.0)

"""Whether a difference between two shares of right answers means anything."""

from __future__ import annotations

from collections.abc import Sequence


def wilson_interval(correct: int, asked: int) -> tuple[float, float]:
    """The 95 % score interval of a share (E. B. Wilson, 1927, "Probable inference", JASA 22).

    Args:
        correct: right answers.
        asked: all answers, at least one.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, asked).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int, float]:
    """McNemar's exact test of two models on the same questions (Q. McNemar, 1947, Psychometrika 12).

    Args:
        before, after: whether each question was answered rightly.

    Returns:
        How many were right only before, right only after, and the two-sided p-value.
    """
    from scipy.stats import binomtest

    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    won = sum(a and not b for b, a in zip(before, after, strict=True))
    p = float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0
    return lost, won, p

"""answers: no rung answers worse than the one before it, by the example's metric and by the held-out loss.

The answers are those that `evaluate` has measured, the losses those that other checks took on their way. A quantized
file has a loss where there is no metric.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.sources import read_rows
from pipeline.run.layout import Layout
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result
from pipeline.verify.rungs import ADAPTER, BASE, GGUF_16BIT, MERGED, OLLAMA, made_by, rungs
from pipeline.verify.statistics import mcnemar, wilson_interval

_SIGNIFICANT = 0.05


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge neighbouring rungs: first the answers, then the losses."""
    yield from _answers(artefacts)
    yield from _losses(artefacts)


def _answers(artefacts: Artefacts) -> Iterator[Result]:
    learned = Claim("answers.learned", "train", "the adapter answers no worse than the base")
    if artefacts.run is None or artefacts.config is None:
        yield learned.not_run("this export has no questions with answers")
        return
    if artefacts.config.eval.metric == "none":
        yield learned.not_run("eval.metric is none")
        return
    correct = {rung: right for rung in rungs(artefacts.config) if (right := marks(Layout(artefacts.run).answers(rung)))}
    artefacts.shared["answers"] = {rung: _score(right) for rung, right in correct.items()}
    if len(correct) < 2:
        yield learned.not_run("`evaluate` has not asked two rungs")
        return
    pairs = [
        (BASE, ADAPTER, learned),
        (ADAPTER, MERGED, Claim("answers.merged", "merge", "the merged model answers no worse than the adapter")),
        (MERGED, GGUF_16BIT, Claim("answers.converted", "convert", "the 16-bit GGUF file answers no worse than it")),
    ]
    if artefacts.removed:
        sentence = "the 16-bit GGUF file answers no worse than the adapter"
        yield pairs[1][2].not_run(artefacts.removed)
        pairs[1:] = [(ADAPTER, GGUF_16BIT, Claim("answers.converted", "convert", sentence))]
    sentence = "the quantized file answers no worse than the 16-bit one"
    for kind in artefacts.quantized:
        pairs.append((GGUF_16BIT, kind, Claim("answers.quantized", made_by(kind), sentence)))
    if artefacts.quantized:
        served = Claim("answers.ollama", "deploy", "Ollama answers no worse than the same file in llama-server")
        pairs.append((next(iter(artefacts.quantized)), OLLAMA, served))
    for before, after, claim in pairs:
        if before in correct and after in correct:
            yield _compared(artefacts, claim, before, correct[before], after, correct[after])
        else:
            yield claim.not_run(f"{after if before in correct else before} was not asked")


def marks(path: Path) -> list[bool]:
    """Which answers of a rung are right, in the order of the questions; none if it was not asked."""
    if not path.is_file():
        return []
    return [bool(row["correct"]) for row in read_rows(path)]


def _score(marks: list[bool]) -> dict[str, Any]:
    right = sum(marks)
    return {
        "correct": right,
        "asked": len(marks),
        "share": right / len(marks),
        "interval_95": wilson_interval(right, len(marks)),
    }


def _compared(
    artefacts: Artefacts, claim: Claim, before: str, first: list[bool], after: str, second: list[bool]
) -> Result:
    """Worse is what loses more than is allowed, and more than chance would."""
    if len(first) != len(second):
        assert artefacts.config is not None
        if artefacts.config.eval.minutes is None:
            return claim.holds(False, f"{before} was asked {len(first)} questions, {after} {len(second)}")
        both = min(len(first), len(second))  # the time allowed one of them fewer
        first, second = first[:both], second[:both]
    lost, won, p = mcnemar(first, second)
    loss = (sum(first) - sum(second)) / len(first)
    artefacts.shared.setdefault("mcnemar", {})[f"{before} -> {after}"] = {"lost": lost, "won": won, "p": p}
    worse = loss > artefacts.settings.answers_lost and p < _SIGNIFICANT
    words = (
        f"{before} answers {sum(first)} of {len(first)} rightly, {after} {sum(second)}: {lost} lost, {won} won, "
        f"p = {p:.2g} (McNemar)"
    )
    return claim.holds(not worse, words, loss, f"at most {artefacts.settings.answers_lost:g}, or p >= {_SIGNIFICANT}")


def _losses(artefacts: Artefacts) -> Iterator[Result]:
    """The held-out loss from rung to rung, as far as it is known."""
    merged = Claim("answers.loss", "merge", "the merged model has the held-out loss of the adapter")
    if artefacts.run is None:
        yield merged.not_run("this export has no held-out rows")
        return
    losses: dict[str, float] = artefacts.shared.get("losses", {})
    limit = artefacts.settings.loss_lost
    sentence = "the 16-bit GGUF file has the held-out loss of the merged model"
    steps = [
        (ADAPTER, MERGED, merged, limit),
        (MERGED, GGUF_16BIT, Claim("answers.loss", "convert", sentence), limit / 10),
    ]
    if artefacts.without_metric:
        sentence = "the quantized file has nearly the held-out loss of the 16-bit one"
        for kind in artefacts.quantized:
            steps.append((GGUF_16BIT, kind, Claim("answers.loss", made_by(kind), sentence), limit))
    for before, after, claim, tolerance in steps:
        if before in losses and after in losses:
            words = f"{before}: {losses[before]:.4f}, {after}: {losses[after]:.4f}"
            yield claim.at_most(losses[after] - losses[before], tolerance, words)
        else:
            yield claim.not_run(f"the loss of {after if before in losses else before} was not measured on these rows")
    if artefacts.without_metric:
        yield Claim("answers.loss", "deploy", "Ollama has the held-out loss of its file").not_run(
            "Ollama gives no probabilities of a given text; it was sent the file that is judged above"
        )

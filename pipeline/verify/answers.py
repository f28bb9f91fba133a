"""answers: no rung answers worse than the one before it, by the example's metric and by the held-out loss.

The answers are those that `evaluate` has measured. The loss is taken here, at the rungs where answers say too little to
tell a broken step from luck: it is one forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.verify.ladder import ADAPTER, BASE, GGUF_16BIT, MERGED, OLLAMA, rungs
from pipeline.verify.result import Claim, Result
from pipeline.verify.statistics import mcnemar, wilson_interval
from pipeline.verify.subject import Subject

_SIGNIFICANT = 0.05


def check(subject: Subject) -> Iterator[Result]:
    """Judge neighbouring rungs: first the answers, then the losses."""
    yield from _answers(subject)
    yield from _losses(subject)


def _answers(subject: Subject) -> Iterator[Result]:
    learned = Claim("answers.learned", "train", "the adapter answers no worse than the base")
    if subject.run is None or subject.config is None:
        yield learned.not_run("this export has no questions with answers")
        return
    if subject.config.eval.metric == "none":
        yield learned.not_run("eval.metric is none")
        return
    every = rungs(list(subject.quantized), trained_on_4bit=subject.trained_on_4bit)
    correct = {rung: marks for rung in every if (marks := _marks(subject.run / "evaluate" / rung / "answers.jsonl"))}
    subject.shared["answers"] = {rung: _score(marks) for rung, marks in correct.items()}
    if len(correct) < 2:
        yield learned.not_run("`evaluate` has not asked two rungs")
        return
    pairs = [
        (BASE, ADAPTER, learned),
        (ADAPTER, MERGED, Claim("answers.merged", "merge", "the merged model answers no worse than the adapter")),
        (MERGED, GGUF_16BIT, Claim("answers.converted", "convert", "the 16-bit GGUF file answers no worse than it")),
    ]
    sentence = "the quantized file answers no worse than the 16-bit one"
    for kind in subject.quantized:
        pairs.append((GGUF_16BIT, kind, Claim("answers.quantized", f"quantize/{kind}", sentence)))
    if subject.quantized:
        served = Claim("answers.ollama", "deploy", "Ollama answers no worse than the same file in llama-server")
        pairs.append((next(iter(subject.quantized)), OLLAMA, served))
    for before, after, claim in pairs:
        if before in correct and after in correct:
            yield _compared(subject, claim, before, correct[before], after, correct[after])
        else:
            yield claim.not_run(f"{after if before in correct else before} was not asked")


def _marks(path: Path) -> list[bool]:
    if not path.is_file():
        return []
    return [bool(json.loads(line)["correct"]) for line in path.read_text(encoding="utf-8").splitlines()]


def _score(marks: list[bool]) -> dict[str, Any]:
    right = sum(marks)
    return {
        "correct": right,
        "asked": len(marks),
        "share": right / len(marks),
        "interval_95": wilson_interval(right, len(marks)),
    }


def _compared(
    subject: Subject, claim: Claim, before: str, first: list[bool], after: str, second: list[bool]
) -> Result:
    """Worse is what loses more than is allowed, and more than chance would."""
    if len(first) != len(second):
        return claim.holds(False, f"{before} was asked {len(first)} questions, {after} {len(second)}")
    lost, won, p = mcnemar(first, second)
    loss = (sum(first) - sum(second)) / len(first)
    subject.shared.setdefault("mcnemar", {})[f"{before} -> {after}"] = {"lost": lost, "won": won, "p": p}
    worse = loss > subject.settings.answers_lost and p < _SIGNIFICANT
    words = (
        f"{before} answers {sum(first)} of {len(first)} rightly, {after} {sum(second)}: {lost} lost, {won} won, "
        f"p = {p:.2g} (McNemar)"
    )
    return claim.holds(not worse, words, loss, f"at most {subject.settings.answers_lost:g}, or p >= {_SIGNIFICANT}")


def _losses(subject: Subject) -> Iterator[Result]:
    """The held-out loss of the rungs on the way to the 16-bit file, as far as it is known."""
    claim = Claim("answers.loss", "merge", "the merged model has the held-out loss of the adapter")
    losses: dict[str, float] = subject.shared.get("losses", {})
    if subject.run is None:
        yield claim.not_run("this export has no held-out rows")
        return
    if "merged" not in losses or not any(rung.startswith("adapter") for rung in losses):
        yield claim.not_run("the losses were not measured")
        return
    limit = subject.settings.loss_lost
    trained = losses.get("adapter on 4-bit", losses.get("adapter on 16-bit", 0.0))
    rise = losses["merged"] - trained
    yield claim.at_most(rise, limit, f"it is {losses['merged']:.4f}, the adapter's where it was trained {trained:.4f}")
    if "16-bit GGUF" in losses:
        step = Claim("answers.loss", "convert", "the 16-bit GGUF file has the held-out loss of the merged model")
        rise = losses["16-bit GGUF"] - losses["merged"]
        words = f"it is {losses['16-bit GGUF']:.4f}, the merged model's {losses['merged']:.4f}"
        yield step.at_most(abs(rise), limit / 10, words)

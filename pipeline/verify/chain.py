"""All checks, one after the other, over the files of one chain.

A check that breaks on what it judges has found it: its error is a failure. Only what a check itself says it cannot do,
what set-up has not brought, or what the disk has no room for, counts as not run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pipeline.errors import NoSpace, NotInstalled, PipelineError, full_disk
from pipeline.verify import (
    answers,
    given_adapter,
    in_ollama,
    logits,
    merge_base,
    prompt,
    quantization,
    special_tokens,
    stopping,
    token_ids,
    toolchain,
    trained_labels,
    weights,
)
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result, document

Check = Callable[[Artefacts], Iterator[Result]]

# Name, check, and the stage that is blamed when the check itself breaks. Answers read what others measured.
CHECKS: dict[str, tuple[Check, str]] = {
    "adapter": (given_adapter.check, "train"),
    "labels": (trained_labels.check, "train"),
    "weights": (weights.check, "merge"),
    "special_tokens": (special_tokens.check, "merge"),
    "tokenizer": (token_ids.check, "convert"),
    "prompt": (prompt.check, "convert"),
    "logits": (logits.check, "convert"),
    "quantization": (quantization.check, "quantize"),
    "stopping": (stopping.check, "convert"),
    "ollama": (in_ollama.check, "deploy"),
    "merge_base": (merge_base.check, "merge"),
    "answers": (answers.check, "evaluate"),
    "toolchain": (toolchain.check, "convert"),
}
# What a folder and a GGUF file alone can show, and the adapter that was merged, if it is given.
EXPORT_CHECKS = (
    *("adapter", "weights", "special_tokens", "tokenizer", "prompt"),
    *("logits", "quantization", "stopping", "ollama", "toolchain"),
)


BROKE_OFF = "the check comes to its end"  # of one that an unexpected error ended: the files' fault, or the machine's


def run_check(name: str, stage: str, check: Callable[[], Iterator[Result]]) -> list[Result]:
    """Collect one check's results, and make one of its error if it has one.

    Args:
        name: the check's name.
        stage: which stage is blamed when the check itself breaks.
        check: called without arguments.
    """
    results: list[Result] = []
    try:
        results.extend(check())
    except (NotInstalled, NoSpace) as error:
        results.append(Claim(name, stage, "the check can be run").not_run(str(error)))
    except PipelineError as error:
        results.append(Claim(name, stage, "the files can be read").holds(False, str(error)))
    except Exception as error:
        words = f"{type(error).__name__}: {str(error).strip()[:300]}"
        if full_disk(error):
            results.append(Claim(name, stage, "the check can be run").not_run(words))
        else:
            results.append(Claim(name, stage, BROKE_OFF).holds(False, words))
    return results


# What is no fault of a run: its folder says of special tokens what the base's says, which its merge adds to.
RUN_CHECKS = tuple(name for name in CHECKS if name != "special_tokens")


def run_checks(artefacts: Artefacts, names: Sequence[str] = RUN_CHECKS) -> list[Result]:
    """Run checks by name and collect their results."""
    results: list[Result] = []
    for name in names:
        check, stage = CHECKS[name]
        started = time.monotonic()
        results += run_check(name, stage, partial(check, artefacts))
        artefacts.shared.setdefault("seconds", {})[name] = round(time.monotonic() - started, 1)
    return results


def verify(artefacts: Artefacts, stages: Sequence[str], names: Sequence[str] = RUN_CHECKS) -> dict[str, Any]:
    """verify.json: verdicts, and the ladders of losses, divergences and answers for the report.

    Args:
        artefacts: what is judged.
        stages: the stages whose outputs that are, in the order of the work.
        names: the checks.
    """
    results = run_checks(artefacts, names)
    kept = ("losses", "divergences", "quantized", "answers", "mcnemar", "seconds")
    return document(results, stages, **{key: artefacts.shared[key] for key in kept if key in artefacts.shared})

"""What a check says: an id, a sentence, a figure, a threshold and a verdict.

A check that could not run says so and why; it is never shown as passed. The first broken stage is the earliest stage of
which a check failed: what comes after it was made from something broken.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.figures import written
from pipeline.verify.rungs import BASE

if TYPE_CHECKING:
    from rich.table import Table

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"


@dataclass(frozen=True)
class Result:
    """One verdict.

    Attributes:
        id: the check and what of it, e.g. "weights.merged".
        stage: whose output is judged, e.g. "merge" or "quantize/q4_k_m".
        sentence: what is claimed.
        verdict: PASS, FAIL or NOT_RUN.
        figure: what was measured; None where nothing was.
        threshold: what the figure was held against.
        words: what is wrong, why it did not run, or more of the figure.
    """

    id: str
    stage: str
    sentence: str
    verdict: str
    figure: Any = None
    threshold: Any = None
    words: str = ""


@dataclass(frozen=True)
class Claim:
    """What a check is about to prove; one of the four methods below makes its verdict."""

    id: str
    stage: str
    sentence: str

    def holds(self, condition: bool, words: str = "", figure: Any = None, threshold: Any = None) -> Result:
        """Passed if the condition is true; `words` say what is wrong if it is not."""
        verdict, words = (PASS, "") if condition else (FAIL, words)
        return Result(self.id, self.stage, self.sentence, verdict, figure, threshold, words)

    def at_most(self, figure: float, limit: float, words: str = "") -> Result:
        """Passed if the figure is no greater than the limit. NaN fails. `words` tell more of the figure, also then."""
        return replace(self.holds(bool(figure <= limit), words, figure, f"at most {limit:g}"), words=words)

    def at_least(self, figure: float, limit: float, words: str = "") -> Result:
        """Passed if the figure is no smaller than the limit. NaN fails. `words` tell more of the figure, also then."""
        return replace(self.holds(bool(figure >= limit), words, figure, f"at least {limit:g}"), words=words)

    def not_run(self, why: str) -> Result:
        """Nothing was judged."""
        return Result(self.id, self.stage, self.sentence, NOT_RUN, words=why)


def first_broken(results: Sequence[Result], stages: Sequence[str]) -> Result | None:
    """The failure at the earliest stage, or None.

    Args:
        results: all verdicts.
        stages: the stages whose outputs are judged, in the order of the work.
    """
    failed = [result for result in results if result.verdict == FAIL]
    order = (BASE, *stages)  # which comes before all stages
    return min(failed, key=lambda result: order.index(result.stage.partition("/")[0]), default=None)


def document(results: Sequence[Result], stages: Sequence[str], **more: Any) -> dict[str, Any]:
    """verify.json; `stages` are the stages whose outputs are judged, in the order of the work."""
    broken = first_broken(results, stages)
    return {
        "verdict": FAIL if broken else PASS,
        "first_broken": asdict(broken) if broken else None,
        "counts": {verdict: sum(r.verdict == verdict for r in results) for verdict in (PASS, FAIL, NOT_RUN)},
        "checks": [asdict(result) for result in results],
        **more,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write verify.json."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def require_passed(content: dict[str, Any]) -> None:
    """End a command with the first broken stage in words.

    Args:
        content: verify.json.

    Raises:
        PipelineError: a check failed.
    """
    if content["verdict"] != PASS:
        raise PipelineError(explain(content))


def summary(content: dict[str, Any]) -> str:
    """How many checks passed, failed and did not run."""
    return ", ".join(f"{count} {verdict}" for verdict, count in content["counts"].items())


def explain(content: dict[str, Any]) -> str:
    """The first broken stage of a verify.json in words."""
    broken, failed = content["first_broken"], content["counts"][FAIL]
    more = f" ({failed - 1} more checks failed after it)" if failed > 1 else ""
    return f"the first broken stage is {broken['stage']}: {broken['id']}: {broken['words']}{more}"


def table(content: dict[str, Any], verdicts: Sequence[str] = (PASS, FAIL, NOT_RUN)) -> Table:
    """The checks of these verdicts for a terminal, the first broken one in red."""
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=None, pad_edge=False)
    for heading in ("check", "stage", "verdict"):
        rows.add_column(heading, no_wrap=True)
    for heading in ("figure", "threshold", ""):
        rows.add_column(heading, overflow="fold")
    colours = {PASS: "green", FAIL: "bold red", NOT_RUN: "yellow"}
    broken = content["first_broken"]
    for row in (row for row in content["checks"] if row["verdict"] in verdicts):
        words = row["words"] if row["verdict"] != PASS else row["sentence"]
        first = broken is not None and (row["id"], row["stage"]) == (broken["id"], broken["stage"])
        rows.add_row(
            Text(row["id"]),
            Text(row["stage"]),
            Text(row["verdict"], style=colours[row["verdict"]]),
            Text(written("", row["figure"])),
            Text(written("", row["threshold"])),
            Text(words, style="red" if row["verdict"] == FAIL else "" if row["verdict"] == NOT_RUN else "dim"),
            style="bold" if first else None,
        )
    return rows

"""What a look at the machine finds: one line each for `pipeline doctor`, an error for set-up, a check for preflight."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from pipeline.errors import PipelineError

OK, WARNING, FAILURE = "ok", "warning", "failure"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what, e.g. "C++ compiler".
        state: OK; WARNING: a run ends well, but not with everything; FAILURE: the main job cannot run.
        found: what is there, or what is wrong with it.
        remedy: what to do about it; "" where nothing has to be done.
    """

    subject: str
    state: str
    found: str
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """All of it in words: "cmake: not on PATH; install it"."""
        return f"{self.subject}: {self.found}{f'; {self.remedy}' if self.remedy else ''}"

    def as_json(self) -> dict[str, str]:
        """For `--json`."""
        return asdict(self)


def require(findings: Iterable[Finding], what: str) -> None:
    """End in one message that names every failure, so that all can be mended at once.

    Args:
        findings: what was found.
        what: what cannot be done, e.g. "llama.cpp cannot be built here".

    Raises:
        PipelineError: there is a failure.
    """
    failures = [finding.sentence for finding in findings if finding.state == FAILURE]
    if failures:
        raise PipelineError(f"{what}: " + "\n  ".join(["", *failures] if len(failures) > 1 else failures).lstrip(" "))

"""Starting the process of a stage, and telling how it ended and what it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.run.code import packages_of
from pipeline.run.stage import Stage
from pipeline.setup.gpu import memory


@dataclass(frozen=True)
class Ended:
    """How a stage's process ended.

    Attributes:
        status: its exit status; negative for a signal.
        cpu_seconds: of all its threads.
        peak_memory_bytes: the most that was resident at once.
    """

    status: int
    cpu_seconds: float
    peak_memory_bytes: int


class Launcher:
    """Runs the stages of one run, or of several, each in a process of its own that ends with this one.

    They are forked from a process that has imported what is slow (`pipeline.run.host`), but for one that has to import
    first (`Stage.imports_first`). Where there is a GPU nothing is imported before the fork: a library that only asks
    for the card leaves its driver in a state that no child can use.

    Args:
        gpu: whether there is one; None to look when the first stage comes.
    """

    def __init__(self, *, gpu: bool | None = None) -> None:
        self._gpu = gpu
        self._host: _Host | None = None

    def run(self, folder: Path, stage: Stage, variant: str, then: Stage | None = None) -> Ended:
        """Run one stage, or one variant of it, in a run's folder; `pipeline.run.worker` says what it leaves there.

        Args:
            folder: the run's.
            stage: the stage.
            variant: which of its variants.
            then: the stage that most likely comes next: what it begins with is imported meanwhile.

        Raises:
            KeyboardInterrupt: Ctrl-C; the stage has ended.
        """
        module = stage.run.__module__
        arguments = [str(folder), str(packages_of(module)), module, stage.name, variant]
        if stage.imports_first:
            host = _Host()
            try:
                return host.run(arguments, (), ())
            finally:
                host.close()
        if self._gpu is None:
            self._gpu = memory() is not None
        if self._host is None:
            self._host = _Host()
        return self._host.run(arguments, self._imported(stage), self._imported(then))

    def _imported(self, stage: Stage | None) -> Sequence[str]:
        """The libraries that are imported before a stage's process is forked."""
        if stage is None or stage.imports_first or self._gpu:
            return ()
        return stage.libraries if stage.begins_with is None else stage.begins_with

    def close(self) -> None:
        """No further stage comes."""
        if self._host is not None:
            self._host.close()


class _Host:
    def __init__(self) -> None:
        # Libraries count their users on the hub unless told not to.
        environment = {"HF_HUB_DISABLE_TELEMETRY": "1", **os.environ, "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.run.host", str(os.getpid())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: Sequence[str], libraries: Sequence[str], then: Sequence[str]) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it was killed, which is told below
            request = json.dumps({"arguments": arguments, "libraries": libraries, "then": then})
            print(request, file=self._process.stdin, flush=True)
        try:
            line = self._process.stdout.readline()
        except KeyboardInterrupt:
            self._process.stdout.readline()  # the terminal has sent the signal to the stage as well: let it end
            raise
        return Ended(**json.loads(line)) if line else Ended(self._process.wait(), 0.0, 0)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

"""llama.cpp's Python scripts, each run in a child of one process that has imported what they import.

Importing torch and transformers takes longer than many a conversion. A process that converts more than once does it
once; a script begins as it would by itself, untouched by what this process or another script has done.

`python -m pipeline.llamacpp.scripts PARENT` reads a JSON list from each line of standard input, a script's path and its
arguments, and hands on what the script prints. Its exit status comes after a NUL, negative for a signal.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.lines import lines
from pipeline.processes import end_with_parent, stop

_SLOW = ("torch", "transformers.models.auto.tokenization_auto")


class Scripts:
    """Runs scripts, one at a time, in processes that end with this one.

    Args:
        environment: variables to set besides this process's own; None takes one away.
    """

    def __init__(self, environment: Mapping[str, str | None]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def run(self, arguments: Sequence[str | Path], on_line: Callable[[str], None]) -> int:
        """Run a script to its end.

        Args:
            arguments: its path and its arguments.
            on_line: called with every line that it prints, as it comes; a carriage return ends a line too.

        Returns:
            Its exit status; negative is the signal that ended it, or the process that all of them run in.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        output, ended = process.stdout.fileno(), None
        try:
            process.stdin.write(json.dumps([str(argument) for argument in arguments]).encode() + b"\n")
            process.stdin.flush()
            for line in lines(piece.replace(b"\r", b"\n") for piece in iter(lambda: os.read(output, 65536), b"")):
                said, last, status = line.partition(b"\0")
                if said or not last:
                    on_line(said.decode("utf-8", "replace"))
                if last:
                    ended = int(status)
                    return ended
            return process.wait()
        finally:
            if ended is None:  # it was killed, or is to end: what it runs ends with it
                stop(process)
                self.close()

    def close(self) -> None:
        """No further script comes soon: another starts anew."""
        process, self._process = self._process, None
        if process is not None:
            process.communicate()

    def _forget(self) -> None:
        self._process = None

    def _start(self) -> "subprocess.Popen[bytes]":
        changed = {**os.environ, **self._environment}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.llamacpp.scripts", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in changed.items() if value is not None},
        )


def main(parent: int) -> None:
    """Run scripts until standard input ends.

    Args:
        parent: the process id of whoever started this.
    """
    end_with_parent(parent)
    for module in _SLOW:
        importlib.import_module(module)
    gc.freeze()
    own = os.getpid()
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            end_with_parent(own)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what comes there next is not for the script
            sys.argv = json.loads(line)
            sys.path[0:0] = [str(Path(sys.argv[0]).parent)]
            runpy.run_path(sys.argv[0], run_name="__main__")
            return
        _, status = os.waitpid(child, 0)
        os.write(1, b"\0%d\n" % os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(int(sys.argv[1]))

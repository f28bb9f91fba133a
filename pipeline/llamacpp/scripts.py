"""llama.cpp's Python scripts, each run in a child of one process that has imported what they import.

Importing torch and transformers takes longer than many a conversion. So it is done once, and a script begins as it
would by itself, untouched by another script or by what this process has done.

That process reads a JSON list from each line of its standard input, a script's path and its arguments, and hands on
what the script prints. Its exit status comes after a NUL, negative for a signal. Either it is started,
`python -m pipeline.llamacpp.scripts PARENT CHANGE MODULE...`, or it is forked from this one (`Scripts.fork`).
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple, NoReturn

from pipeline.lines import lines
from pipeline.processes import end_with_parent, leave


class _Server(NamedTuple):
    """The process: where its requests are written, and where its output is read."""

    pid: int
    requests: int
    output: int


class Scripts:
    """Runs scripts, one at a time, in processes that end with this one.

    Args:
        environment: variables to set besides this process's own; None takes one away.
        imports: the modules that they import and that take long.
        change: a function of a module, called before them to change what else they import.
    """

    def __init__(
        self,
        environment: Mapping[str, str | None],
        imports: Sequence[str],
        change: Callable[[], object],
    ) -> None:
        self._environment = environment
        self._imports, self._change = imports, change
        self._server: _Server | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def fork(self) -> None:
        """Fork the process that scripts will run in, where this one has imported what they import.

        To be called before anything else is done here: what was is there too, and threads are not.
        """
        if self._server is None and all(module in sys.modules for module in self._imports):
            self._server = self._make(self._forked)

    def run(self, arguments: Sequence[str | Path], on_line: Callable[[str], None]) -> int:
        """Run a script to its end.

        Args:
            arguments: its path and its arguments.
            on_line: called with every line that it prints, as it comes; a carriage return ends a line too.

        Returns:
            Its exit status; negative is the signal that ended it, or the process that all of them run in.
        """
        if self._server is not None and select.select([self._server.output], [], [], 0)[0]:
            self.close()  # it has ended, while nothing ran
        server = self._server = self._server or self._make(self._started)
        ended = None
        try:
            os.write(server.requests, json.dumps([str(argument) for argument in arguments]).encode() + b"\n")
            pieces = iter(lambda: os.read(server.output, 65536), b"")
            for line in lines(piece.replace(b"\r", b"\n") for piece in pieces):
                said, last, status = line.partition(b"\0")
                if said or not last:
                    on_line(said.decode("utf-8", "replace"))
                if last:
                    ended = int(status)
                    return ended
        finally:
            if ended is None:  # it was killed, or is to end: what it runs ends with it
                with suppress(ProcessLookupError):
                    os.kill(server.pid, signal.SIGKILL)
                killed = self.close()
        return killed

    def close(self) -> int:
        """No further script comes soon: another starts anew. Returns how the process ended."""
        server, self._server = self._server, None
        if server is None:
            return 0
        os.close(server.requests)
        os.close(server.output)
        return os.waitstatus_to_exitcode(os.waitpid(server.pid, 0)[1])

    def _forget(self) -> None:
        """A child of this process has no scripts; what it held open would keep the server waiting for more."""
        if self._server is not None:
            os.close(self._server.requests)
            os.close(self._server.output)
        self._server = None

    def _make(self, process: Callable[[int, int], int]) -> _Server:
        """The process that `process` makes, given what it reads and what it writes."""
        read, requests = os.pipe()
        output, write = os.pipe()
        try:
            return _Server(process(read, write), requests, output)
        finally:
            os.close(read)
            os.close(write)

    def _started(self, read: int, write: int) -> int:
        change = f"{self._change.__module__}:{self._change.__qualname__}"
        command = [sys.executable, "-P", "-m", __name__, str(os.getpid()), change, *self._imports]
        standard = [(os.POSIX_SPAWN_DUP2, own, number) for number, own in enumerate((read, write, write))]
        return os.posix_spawn(command[0], command, self._variables(), file_actions=standard)

    def _forked(self, read: int, write: int) -> int:
        sys.stdout.flush()  # else what waits there is written twice
        parent, child = os.getpid(), os.fork()
        if child == 0:
            for number, own in enumerate((read, write, write)):
                os.dup2(own, number)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            variables = self._variables()
            os.environ.clear()
            os.environ.update(variables)
            main(parent, self._change, self._imports)
        return child

    def _variables(self) -> dict[str, str]:
        changed = {**os.environ, **self._environment}
        return {name: value for name, value in changed.items() if value is not None}


def main(parent: int, change: Callable[[], object], imports: Sequence[str]) -> NoReturn:
    """Run scripts until standard input ends.

    Args:
        parent: the process id of whoever started this.
        change: called before.
        imports: what they begin with.
    """
    end_with_parent(parent)
    change()
    for module in imports:
        importlib.import_module(module)
    gc.freeze()
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, TextIOWrapper)
        stream.reconfigure(write_through=True)
    own = os.getpid()
    with open(0, "rb", closefd=False) as requests:
        for line in requests:
            child = os.fork()
            if child == 0:
                end_with_parent(own)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what comes there next is not for the script
                _run(json.loads(line))
            _, status = os.waitpid(child, 0)
            os.write(1, b"\0%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _run(arguments: list[str]) -> NoReturn:
    sys.argv, sys.path[0:0] = arguments, [str(Path(arguments[0]).parent)]
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        leave(0)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        traceback.print_exc()
        leave(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), pkgutil.resolve_name(sys.argv[2]), sys.argv[3:])

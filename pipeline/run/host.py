"""The process that a run's stages are forked from: `python -m pipeline.run.host PARENT`.

Importing torch, transformers and PEFT takes longer than what most stages do with them. Here it is done once: the first
stage that needs them has them imported, and every stage is a child that begins with them, untouched by other stages.

On standard input comes one JSON line for each stage, {"arguments": [...], "libraries": [...], "then": [...]}: what
`pipeline.run.worker` is given, what the stage declares of what may be imported, and what the next one does, which is
imported while this one runs. When the stage has ended, one line goes to standard output:
{"status": ..., "cpu_seconds": ..., "peak_memory_bytes": ...}; a signal is a negative status.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from pipeline.llamacpp.converter import SCRIPTS
from pipeline.processes import end_with_parent, leave
from pipeline.run import worker
from pipeline.run.layout import Layout

# What takes long to import, by the library's name.
_SLOW = {
    "torch": ("torch",),
    "transformers": ("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    "peft": ("peft",),
}
_failed: dict[str, Exception] = {}  # what came of importing a module, whether ahead or in its turn


def main(parent: int) -> int:
    """Run stages until standard input ends.

    Args:
        parent: the process id of whoever started this.
    """
    end_with_parent(parent)
    own = os.getpid()
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the stage as well, which ends
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    ahead: threading.Thread | None = None
    for line in sys.stdin:
        request = json.loads(line)
        run, packages, module, name, variant = request["arguments"]
        log = Layout(Path(run)).log(name, variant)
        if ahead is not None:
            ahead.join()  # a process with threads is not forked
        # Nothing is lost with this process while it only imports, so Ctrl-C ends it at once.
        signal.signal(signal.SIGINT, signal.SIG_IGN if interrupted == signal.SIG_IGN else signal.SIG_DFL)
        failure = _import(request["libraries"], log)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        gc.freeze()  # what was imported stays: no stage need look through it for garbage
        child = os.fork()
        if child == 0:
            end_with_parent(own)
            signal.signal(signal.SIGINT, interrupted)
            answers.close()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what comes there next is not for the stage
            SCRIPTS.fork()
            leave(worker.main(Path(run), packages, module, name, variant, failure))
        ahead = threading.Thread(target=_import, args=(request["then"], log), daemon=True)
        ahead.start()
        _, status, usage = os.wait4(child, 0)
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _import(libraries: Iterable[str], log: Path) -> Exception | None:
    """Import what is slow of some libraries; what they print while they are imported goes to the stage's log.

    Returns:
        The error of one that cannot be imported, which is the stage's to tell.
    """
    modules = [module for library in libraries for module in _SLOW.get(library, ()) if module not in sys.modules]
    if not modules:
        return None
    terminal = os.dup(2)
    worker.print_to(log)
    try:
        for module in modules:
            # A second attempt at a half-imported library fails otherwise.
            if module not in _failed:
                try:
                    importlib.import_module(module)
                except Exception as error:
                    _failed[module] = error
            if module in _failed:
                return _failed[module]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        os.close(terminal)
    return None


if __name__ == "__main__":
    leave(main(int(sys.argv[1])))  # whatever is still imported ahead

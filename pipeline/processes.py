"""How set-up runs other programs: an argument list, the output in a log, and one message when it fails."""

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.console import say
from pipeline.errors import PipelineError
from pipeline.resources import cache_folder

NO_SPACE = re.compile(r"no space left on device|disk quota exceeded|file too large|file size limit exceeded", re.I)
NO_NETWORK = re.compile(
    r"name or service not known|temporary failure in name resolution|could not resolve|connection refused"
    r"|network is unreachable|failed to establish a new connection|cannot connect to proxy"
    r"|max retries exceeded|dial tcp|proxyconnect|tunnel|error sending request|dns error|timed out"
    r"|enotfound|econnrefused|eai_again",
    re.I,
)
_TELLING = re.compile(r"\berror\b|\bfatal\b|cannot|could not|not found|no such|requires", re.I)


def find_program(*names: str) -> str | None:
    """The first of these programs that is on PATH or in this Python's environment."""
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.prefix) / "bin")])
    return next((found for name in names if (found := shutil.which(name, path=places))), None)


def run(
    arguments: Sequence[str | Path],
    what: str,
    *,
    on_line: Callable[[str], None] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    text: str | None = None,
    explain: Sequence[tuple[re.Pattern[str], str]] = (),
    holding: Sequence[int] = (),
    logs: Path | None = None,
) -> str:
    """Run a program to its end.

    Args:
        arguments: the program and what it is given.
        what: what it does, for the messages: "building llama.cpp".
        on_line: called with every line it prints, as it comes.
        cwd: where it runs.
        env: variables added to this process's own; None takes one away.
        text: what it reads on standard input.
        explain: patterns of its output and what they mean to a user, tried before the usual ones.
        holding: descriptors of locks that it must hold too, should this process be killed before it.
        logs: folder of the log; default: in the cache.

    Returns:
        All that it printed.

    Raises:
        PipelineError: it failed; the message says why and where the log is.
    """
    log = (logs or cache_folder() / "logs") / f"{re.sub(r'[^A-Za-z0-9.]+', '-', what)}.log"
    changed = {**os.environ, **(env or {})}
    with disk_errors(log.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8", buffering=1) as record:
            process = subprocess.Popen(
                [str(argument) for argument in arguments],
                cwd=cwd,
                env={name: value for name, value in changed.items() if value is not None},
                stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                pass_fds=tuple(holding),
            )
            assert process.stdout is not None
            try:
                if process.stdin is not None:
                    process.stdin.write(text or "")
                    process.stdin.close()
                lines = []
                for line in process.stdout:
                    record.write(line)
                    lines.append(line)
                    if on_line is not None:
                        on_line(line.rstrip())
                status = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
    output = "".join(lines)
    if status == 0:
        return output
    for pattern, meaning in (*explain, (NO_SPACE, _NO_SPACE), (NO_NETWORK, _NO_NETWORK)):
        if pattern.search(output):
            raise PipelineError(f"{what}: {meaning}\n  it said: {_telling(lines, pattern)}\n  all of it: {log}")
    raise PipelineError(
        f"{what} failed with exit status {status}\n  it said: {_telling(lines, _TELLING)}\n  all of it: {log}"
    )


_NO_SPACE = "the disk is full; free some space and run `pipeline setup` again: it goes on where it stopped"
_NO_NETWORK = (
    "the network cannot be reached; it is needed once. Check the connection and the proxy and index settings "
    "of pip, uv, Go and npm, then run `pipeline setup` again"
)


def _telling(lines: list[str], pattern: re.Pattern[str]) -> str:
    """The line that says most: the last one that matches, else the last that is not empty."""
    full = [line.strip() for line in lines if line.strip()]
    return next((line for line in reversed(full) if pattern.search(line)), full[-1] if full else "nothing")[:400]


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise PipelineError(f"{folder}: {_NO_SPACE}") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise PipelineError(
                f"{error.filename or folder}: cannot be written ({error.strerror}); "
                "set PIPELINE_CACHE to a folder that can"
            ) from error
        raise


@contextmanager
def exclusive(path: Path) -> Iterator[int]:
    """Hold a lock that only one set-up on the machine can hold; waits for it and says so.

    Yields:
        The lock's descriptor. A child that inherits it keeps the lock: a compiler that outlives a killed
        set-up is waited for.
    """
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another `pipeline setup` on this machine to end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)

"""Other programs: how one is run or started, listened to and ended, and what is said when it fails.

Programs are argument lists, without a shell. One that is run for a stage, and every server, ends when this process
does, however that ends; a compiler of set-up goes on, and holds set-up's lock until it is done.
"""

import atexit
import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from pipeline.console import say
from pipeline.errors import NoSpace, PipelineError, full_disk
from pipeline.figures import size
from pipeline.lines import lines
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


def follow(
    arguments: Sequence[str | Path],
    on_line: Callable[[str], None],
    *,
    environment: Mapping[str, str | None] | None = None,
    folder: Path | None = None,
    text: str | None = None,
    holding: Sequence[int] = (),
    ends_with_us: bool = True,
) -> int:
    """Run a program to its end, handing on what it prints as it prints it.

    Args:
        arguments: the program and its arguments.
        on_line: called with every line of its standard output and error; a carriage return ends a line too,
            so that progress bars arrive piece by piece.
        environment: variables to set besides this process's own; None takes one away.
        folder: its working folder.
        text: what it reads on standard input.
        holding: descriptors that it inherits.
        ends_with_us: it ends when this process does, also when that is killed.

    Returns:
        Its exit status; negative is the signal that ended it.
    """
    changed = {**os.environ, **(environment or {})}
    process = subprocess.Popen(
        [str(argument) for argument in arguments],
        stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={name: value for name, value in changed.items() if value is not None},
        cwd=folder,
        pass_fds=tuple(holding),
        preexec_fn=die_with_parent if ends_with_us else None,
    )
    assert process.stdout is not None
    output = process.stdout.fileno()
    try:
        if process.stdin is not None:
            process.stdin.write((text or "").encode())
            process.stdin.close()
        for line in lines(piece.replace(b"\r", b"\n") for piece in iter(lambda: os.read(output, 65536), b"")):
            on_line(line.decode("utf-8", "replace"))
        return process.wait()
    finally:
        stop(process)
        process.stdout.close()


def start(
    arguments: Sequence[str | Path], log: IO[bytes], environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a server, in a session of its own: a terminal's Ctrl-C is for this process, which then stops it.

    Args:
        arguments: the program and its arguments.
        log: what it prints is written there.
        environment: all of its variables; None for this process's own.

    Returns:
        The program; `stop` ends it, and so does the end of this process.
    """
    return subprocess.Popen(
        [str(argument) for argument in arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


# What httpx is told of a server on this machine: no proxy is asked, and no certificates are read, which takes 30 ms.
ON_THIS_MACHINE: dict[str, Any] = {"trust_env": False, "verify": False}


def wait_until(ready: Callable[[], bool], process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Wait for a server.

    Args:
        ready: asks whether it answers.
        process: the server.
        seconds: how long to wait.

    Returns:
        Whether it answers: False if it has ended, or the time is up.
    """
    deadline, pause = time.monotonic() + seconds, 0.01
    while time.monotonic() < deadline and process.poll() is None:
        if ready():
            return True
        time.sleep(pause)
        pause = min(0.2, pause * 1.5)
    return False


def stop(process: "subprocess.Popen[bytes]", seconds: float = 10) -> None:
    """End a program that may be running: it is asked to, and killed if it has not after so many seconds.

    What leads a session of its own (`start`) is killed with all that it has started.
    """
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def die_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Have Linux send this process a signal when its parent ends, however that ends. Elsewhere nothing happens.

    A child calls it between fork and exec, or first of all.
    """
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, by)


def cores() -> int:
    """How many processors this process may use, or is told to compute with as torch and llama.cpp are."""
    told = re.match(r"[1-9]\d*", os.environ.get("OMP_NUM_THREADS", ""))
    there = len(os.sched_getaffinity(0))
    return min(there, int(told[0])) if told else there


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends: a stage would go on writing into a folder that nobody has locked.

    Args:
        parent: the parent's process id; where it has ended already, so does this process.
    """
    if sys.platform == "linux":
        die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that was asked for
            sys.exit(128 + signal.SIGKILL)


def leave(status: int) -> NoReturn:
    """End this process without taking apart, piece by piece, what was imported: that takes its time."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to start writing what the disk cannot hold.

    Args:
        folder: an existing folder on that disk.
        needed: bytes.
        what: what is to be written, for the message.

    Raises:
        NoSpace: there is less free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpace(
            f"the disk of {folder} is too full for {what}: it needs about {size(needed)} and {size(free)} are "
            "free; free some space and run the same command again"
        )


def failure(what: str, status: int, output: Sequence[str], folder: Path | None = None) -> PipelineError:
    """The error for a program that failed: what it was doing, and the end of what it said.

    Args:
        what: what was being done.
        status: the exit status; negative for a signal.
        output: the lines that it printed.
        folder: where it wrote, to see whether the disk is full: llama.cpp's programs only say "iostream error".
    """
    said = [line.strip() for line in output if line.strip()]
    full = folder is not None and shutil.disk_usage(folder).free < _FULL
    if full or any(NO_SPACE.search(line) or "iostream error" in line for line in said):
        return NoSpace(
            f"{what}: the output cannot be written, most likely because the disk is full: free some space and "
            "run the same command again" + _last(said[-2:])
        )
    if status < 0:
        name = signal.Signals(-status).name
        more = " (out of memory?)" if -status == signal.SIGKILL else ""
        return PipelineError(f"{what}: ended by {name}{more}" + _last(said))
    return PipelineError(f"{what}: failed with exit status {status}" + _last(said))


def _last(said: Sequence[str]) -> str:
    return ":\n  " + "\n  ".join(said[-8:]) if said else ", without a word"


_FULL = 1 << 20  # bytes: a disk with less is full


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
    """Run one of set-up's programs to its end, with all that it prints in a log of the cache.

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
    said: list[str] = []
    with disk_errors(log.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8", buffering=1) as record:

            def read(line: str) -> None:
                record.write(f"{line}\n")
                said.append(line)
                if on_line is not None:
                    on_line(line.rstrip())

            status = follow(
                arguments, read, environment=env, folder=cwd, text=text, holding=holding, ends_with_us=False
            )
    output = "".join(f"{line}\n" for line in said)
    if status == 0:
        return output
    for pattern, meaning in (*explain, (NO_SPACE, _NO_SPACE), (NO_NETWORK, _NO_NETWORK)):
        if pattern.search(output):
            raise PipelineError(f"{what}: {meaning}\n  it said: {_telling(said, pattern)}\n  all of it: {log}")
    raise PipelineError(
        f"{what} failed with exit status {status}\n  it said: {_telling(said, _TELLING)}\n  all of it: {log}"
    )


_NO_SPACE = "the disk is full; free some space and run `pipeline setup` again: it goes on where it stopped"
_NO_NETWORK = (
    "the network cannot be reached; it is needed once. Check the connection and the proxy and index settings "
    "of pip, uv, Go and npm, then run `pipeline setup` again"
)


def _telling(said: list[str], pattern: re.Pattern[str]) -> str:
    """The line that says most: the last one that matches, else the last that is not empty."""
    full = [line.strip() for line in said if line.strip()]
    return next((line for line in reversed(full) if pattern.search(line)), full[-1] if full else "nothing")[:400]


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one message."""
    try:
        yield
    except OSError as error:
        if full_disk(error):
            raise NoSpace(f"{folder}: {_NO_SPACE}") from error
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

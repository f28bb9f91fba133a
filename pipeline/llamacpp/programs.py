"""Where llama.cpp's programs and its source tree are, and how one of them is run.

All of them come from the one pin that `pipeline setup` builds: a converter, a quantizer and a server of different
versions can each succeed and still not agree. PIPELINE_LLAMACPP and PIPELINE_LLAMACPP_SOURCE name other folders.
"""

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.errors import NotInstalled, PipelineError


def program(name: str) -> Path:
    """The path of a program, e.g. "llama-quantize".

    Raises:
        NotInstalled: it is not there.
    """
    return _existing(programs_folder() / name, name, "PIPELINE_LLAMACPP")


def installed(name: str) -> bool:
    """Whether a program is there."""
    try:
        program(name)
    except NotInstalled:
        return False
    return True


def programs_folder() -> Path:
    """The folder of the built programs and their shared libraries."""
    return _given("PIPELINE_LLAMACPP", "llamacpp_folder")


def source_tree() -> Path:
    """The pinned source, with convert_hf_to_gguf.py, conversion/ and gguf-py/."""
    tree = _given("PIPELINE_LLAMACPP_SOURCE", "llamacpp_source")
    _existing(tree / "convert_hf_to_gguf.py", "llama.cpp's converter", "PIPELINE_LLAMACPP_SOURCE")
    return tree


def _given(variable: str, from_setup: str) -> Path:
    if given := os.environ.get(variable):
        return Path(given)
    from pipeline.setup import toolchain

    folder: Path | None = getattr(toolchain, from_setup)()
    if folder is None:
        raise NotInstalled("llama.cpp is not built on this machine yet: run `pipeline setup`")
    return folder


def _existing(path: Path, what: str, variable: str) -> Path:
    if not path.is_file():
        remedy = f"{variable} names another folder: correct it" if variable in os.environ else "run `pipeline setup`"
        raise NotInstalled(f"{what} is not at {path}: {remedy}")
    return path


def run(
    arguments: Sequence[str | Path],
    *,
    on_line: Callable[[str], None],
    environment: Mapping[str, str | None] | None = None,
    folder: Path | None = None,
) -> int:
    """Run a program to its end, handing on what it prints as it prints it.

    Args:
        arguments: the program and its arguments.
        on_line: called with every line of its standard output and error; a carriage return ends a line too,
            so that progress bars arrive piece by piece.
        environment: variables to set besides this process's own; None takes one away.
        folder: its working folder.

    Returns:
        Its exit status; negative is the signal that ended it.

    The program ends when this process does, also when that is killed.
    """
    changed = {**os.environ, **(environment or {})}
    variables = {name: value for name, value in changed.items() if value is not None}
    process = subprocess.Popen(
        [str(argument) for argument in arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=variables,
        cwd=folder,
        preexec_fn=die_with_parent,
    )
    assert process.stdout is not None
    try:
        rest = b""
        while piece := os.read(process.stdout.fileno(), 65536):
            *lines, rest = (rest + piece.replace(b"\r", b"\n")).split(b"\n")
            for line in lines:
                on_line(line.decode("utf-8", "replace"))
        if rest:
            on_line(rest.decode("utf-8", "replace"))
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to start writing what the disk cannot hold.

    Args:
        folder: an existing folder on that disk.
        needed: bytes.
        what: what is to be written, for the message.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PipelineError(
            f"the disk of {folder} is too full for {what}: it needs about {needed / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free; free some space and run the same command again"
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
    if full or any("No space left on device" in line or "iostream error" in line for line in said):
        return PipelineError(
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


# Bytes: a disk with less is full.
_FULL = 1 << 20
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Between fork and exec: have Linux end this process when its parent ends, however that ends."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

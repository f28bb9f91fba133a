"""The machine apart from its GPU: Python, what builds llama.cpp, Go, disks, memory, the machine's own Ollama.

Set-up asks before anything long is begun, `pipeline doctor` shows it all, preflight asks before a run.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.errors import UserError
from pipeline.figures import GIB, memory_size
from pipeline.processes import find_program
from pipeline.setup.machine_findings import FAILURE, OK, WARNING, Finding, require

# The example's run, with what its stages need on the way; preflight counts a run's own needs from its base.
LEAST_FOR_A_RUN = 4 * GIB
_PYTHONS = ((3, 11), (3, 14))  # the first and the last that requirements.lock serves


def has_own_environment() -> bool:
    """Whether no other programs share this Python: a virtual environment, or one of conda's but for its base."""
    prefix = Path(sys.prefix)
    of_conda = (prefix / "conda-meta").is_dir() and not (prefix / "condabin").is_dir()
    return sys.prefix != sys.base_prefix or of_conda


def require_virtual_environment() -> None:
    """Refuse to install into a Python that other programs share."""
    if not has_own_environment():
        raise UserError(
            f"{sys.executable} is not in a virtual environment, and set-up installs into the Python "
            "that runs it: type `python3 -m venv .venv`, install this program there, and run "
            "`.venv/bin/pipeline setup`"
        )


def python() -> Finding:
    """The interpreter, and whether it is in an environment of its own."""
    words = f"{system_name()}, {sys.executable}"
    first, last = (".".join(map(str, version)) for version in _PYTHONS)
    if not (_PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]) or sys.platform != "linux":
        return Finding("Python", FAILURE, words, f"requirements.lock serves Linux with Python {first} to {last}")
    if not has_own_environment():
        return Finding("Python", FAILURE, f"{words}: no virtual environment", "make one with `python3 -m venv .venv`")
    return Finding("Python", OK, words)


def compilers(*, needed: bool = True) -> Iterator[Finding]:
    """What builds llama.cpp.

    Args:
        needed: it is still to be built; where it is built already, what is missing is no failure.
    """
    wanted = (
        ("C++ compiler", "CXX", ("c++", "g++", "clang++"), "no C++ compiler (g++ or clang++)", "g++"),
        ("C compiler", "CC", ("cc", "gcc", "clang"), "no C compiler (gcc or clang)", "gcc"),
        ("CMake", "", ("cmake",), "no cmake", "cmake"),
        ("build tool", "", ("ninja", "make"), "neither ninja nor make", "ninja-build"),
    )
    for subject, variable, names, absent, package in wanted:
        given = os.environ.get(variable) if variable else None
        if given and shutil.which(shlex.split(given)[0]) is None:
            state = FAILURE if needed else WARNING
            yield Finding(subject, state, f"{variable}={given}: no such program", f"name another, or unset {variable}")
            continue
        found = given or find_program(*names)
        if found:
            yield Finding(subject, OK, found)
        elif needed:
            remedy = f"install it, e.g. `apt-get install {package}`, and run `pipeline setup` again"
            yield Finding(subject, FAILURE, f"{absent} on PATH", remedy)
        else:
            yield Finding(subject, WARNING, f"{absent} on PATH; llama.cpp is built already", "needed for a newer pin")


def require_compilers() -> None:
    """Ask for what builds llama.cpp.

    Raises:
        PipelineError: names everything that is missing, so that it can be installed at once.
    """
    require(compilers(), "llama.cpp cannot be built here")


def space(needs: Mapping[Path, float], what: str, roles: Mapping[Path, str] | None = None) -> Iterator[Finding]:
    """The free space of every disk that something is to be written to.

    Args:
        needs: bytes that will be written, by folder. Folders on one disk are added up.
        what: what needs it, e.g. "set-up".
        roles: what each folder is, for the findings' names.
    """
    totals: dict[int, tuple[list[Path], float]] = {}
    for folder, needed in needs.items():
        place = existing(folder)
        folders, total = totals.setdefault(place.stat().st_dev, ([], 0.0))
        totals[place.stat().st_dev] = ([*folders, folder], total + needed)
    for folders, needed in totals.values():
        free = shutil.disk_usage(existing(folders[0])).free
        where = ", ".join(str(folder) for folder in folders)
        subject = f"disk of {', '.join(roles[folder] for folder in folders)}" if roles else "disk"
        if free < needed:
            yield Finding(
                subject,
                FAILURE,
                f"{where}: {what} needs about {memory_size(needed)} on this disk, {memory_size(free)} are free",
                "free some space, or set PIPELINE_CACHE to a folder on another disk",
            )
        else:
            words = f", {what} needs {memory_size(needed)}" if needed else ""
            yield Finding(subject, OK, f"{where}: {memory_size(free)} free{words}")


def require_space(needs: Mapping[Path, float]) -> None:
    """Ask for free disk space.

    Raises:
        PipelineError: says which disk, how much is free and how much is needed.
    """
    require(space(needs, "set-up"), "there is too little room")


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def memory_bytes() -> int:
    """The machine's memory, or what a container leaves of it."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def free_memory() -> int:
    """Bytes of it that programs can still take without swapping."""
    import psutil

    return min(int(psutil.virtual_memory().available), memory_bytes())


def memory(least: float = 6 * GIB) -> Finding:
    """The machine's memory against what the example needs, in bytes."""
    total = memory_bytes()
    words = memory_size(total)
    if total < least:
        remedy = "the example may not fit; close other programs"
        return Finding("memory", WARNING, f"{words}, and the example takes up to {memory_size(least)}", remedy)
    return Finding("memory", OK, words)


def go(*, needed: bool = True) -> Finding:
    """Go, which builds Ollama, if that is still to be built (`needed`)."""
    from packaging.version import Version

    from pipeline.setup.pins import load_pins

    pin = load_pins().ollama
    remedy = f"install Go {pin.go} or newer, or Ollama itself, if you want the last stage"
    found = find_program("go")
    if found is None:
        return Finding("Go", WARNING, "not on PATH", remedy) if needed else _go_is_not_needed("not on PATH")
    # A Go of 1.21 or newer fetches the one that a module asks for, unless it is told not to.
    asked = [found, "env", "GOVERSION", "GOTOOLCHAIN"]
    answer = subprocess.run(asked, cwd="/", capture_output=True, text=True, check=False)
    version, _, fetches = answer.stdout.partition("\n")
    match = re.match(r"go(\d+(?:\.\d+)*)", version)
    words = f"{match[1] if match else 'version not told'}, {found}"
    if match and Version(match[1]) < Version(pin.go) and fetches.strip() in ("", "local"):
        words += f", which is too old for Ollama {pin.version}"
        return Finding("Go", WARNING, words, remedy) if needed else _go_is_not_needed(words)
    return Finding("Go", OK, words)


def _go_is_not_needed(words: str) -> Finding:
    return Finding("Go", OK, f"{words}; Ollama is built already")


def system_name() -> str:
    """This Python and this system, for messages."""
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"

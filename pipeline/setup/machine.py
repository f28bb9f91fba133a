"""What set-up needs of the machine, asked before anything long is begun."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import PipelineError, UserError
from pipeline.processes import find_program

GIB = 2**30


def require_virtual_environment() -> None:
    """Refuse to install into a Python that other programs share."""
    if sys.prefix == sys.base_prefix:
        raise UserError(
            f"{sys.executable} is not in a virtual environment, and set-up installs into the Python "
            "that runs it: type `python3 -m venv .venv`, install this program there, and run "
            "`.venv/bin/pipeline setup`"
        )


def require_compilers() -> None:
    """Ask for what builds llama.cpp.

    Raises:
        PipelineError: names everything that is missing, so that it can be installed at once.
    """
    missing = []
    if not (os.environ.get("CXX") or find_program("c++", "g++", "clang++")):
        missing.append("no C++ compiler (g++ or clang++)")
    if not (os.environ.get("CC") or find_program("cc", "gcc", "clang")):
        missing.append("no C compiler (gcc or clang)")
    if not find_program("cmake"):
        missing.append("no cmake")
    if not find_program("ninja", "make"):
        missing.append("neither ninja nor make")
    if missing:
        raise PipelineError(
            f"llama.cpp cannot be built here: {', '.join(missing)} on PATH. Install what is missing, e.g. "
            "`apt-get install g++ cmake ninja-build` (cmake and ninja also come from pip), "
            "and run `pipeline setup` again"
        )


def require_space(needs: Mapping[Path, float]) -> None:
    """Ask for free disk space.

    Args:
        needs: bytes that will be written, by folder. Folders on one disk are added up.

    Raises:
        PipelineError: says which disk, how much is free and how much is needed.
    """
    totals: dict[int, tuple[Path, float]] = {}
    for folder, size in needs.items():
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        device = place.stat().st_dev
        totals[device] = (totals.get(device, (place, 0.0))[0], totals.get(device, (place, 0.0))[1] + size)
    for place, size in totals.values():
        free = shutil.disk_usage(place).free
        if free < size:
            raise PipelineError(
                f"{place}: set-up needs about {size / GIB:.1f} GiB on this disk, {free / GIB:.1f} are free; "
                "free some space, or set PIPELINE_CACHE to a folder on another disk"
            )


def has_nvidia_driver() -> bool:
    """Whether the machine has an NVIDIA driver, so that the CUDA build of torch is of use."""
    return Path("/proc/driver/nvidia/version").exists() or find_program("nvidia-smi") is not None


def system_ollama(at_least: str) -> tuple[str, str] | None:
    """The machine's own Ollama, if it is new enough: its path and version. Nothing about it is changed."""
    program = shutil.which("ollama")
    if program is None:
        return None
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # "ollama version is 1.2.3" is the running server's; without one it warns and names the client's.
    found = re.findall(r"version is v?(\d+(?:\.\d+)+)", answer.stdout + answer.stderr)
    if not found or _numbers(found[-1]) < _numbers(at_least):
        return None
    return program, found[-1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def system_name() -> str:
    """This Python and this system, for messages."""
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"

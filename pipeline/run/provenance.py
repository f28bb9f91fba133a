"""What a run was made with: versions of the packages, the pins of the programs, the machine."""

import os
import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def provenance(libraries: Iterable[str]) -> dict[str, Any]:
    """Versions, pins and machine as JSON values.

    Args:
        libraries: the packages whose versions are told, beside this program's own.
    """
    from pipeline.setup.pins import pins

    names = ("finetune-pipeline", *sorted(set(libraries)))
    return {
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in names}},
        "pins": pins(),
        "machine": machine(),
    }


@cache
def installed_version(library: str) -> str | None:
    """The version of an installed package, or None without it."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The processor, its cores, the memory in bytes, and the names of the CUDA devices' driver if there is one."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu_memory() is not None,
    }


def gpu_memory() -> int | None:
    """Bytes of the first CUDA device, or None without one. Asks the driver's tool: importing torch takes seconds."""
    import shutil
    import subprocess

    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    first = answer.stdout.split("\n")[0].strip()
    return int(first) * 2**20 if answer.returncode == 0 and first.isdigit() else None

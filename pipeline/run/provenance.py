"""What a run was made with: versions of the packages, the pins of the programs, the machine."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "finetune-pipeline",
    "unsloth",
    "unsloth_zoo",
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "bitsandbytes",
    "accelerate",
    "tokenizers",
    "safetensors",
    "gguf",
    "jinja2",
)


def provenance() -> dict[str, Any]:
    """Versions, pins and machine as JSON values."""
    from pipeline.setup.pins import pins

    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "pins": pins(),
        "machine": machine(),
    }


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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

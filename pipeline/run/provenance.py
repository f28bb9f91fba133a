"""What a run was made with: versions of the packages, the pins of the programs, the machine."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.hardware import gpu_memory, memory

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
    "ollama",
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
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": memory(),
        "gpu": gpu_memory() is not None,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

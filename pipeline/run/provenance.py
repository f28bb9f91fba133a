"""What a run was made with: versions of the packages, the pins of the programs, the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import Model


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
    """The system, its cores, the memory in bytes, and the GPUs that a program may use."""
    from pipeline.setup import gpu
    from pipeline.setup.machine import memory_bytes

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "gpus": [asdict(card) for card in gpu.gpus().cards],
        "gpu_memory_bytes": gpu.memory(),
    }


def wherever(base: str | None) -> str | None:
    """A base by its name: where it lies on a machine, if it does, has no part in a result."""
    return base and (Path(base).name if Path(base).is_absolute() else base)


def first_machine(manifest: dict[str, Any], model: Model) -> dict[str, Any] | None:
    """The machine on which a run's first stage was done for this base; None before that.

    Defaults that depend on a machine stay those of this one: a run that goes on elsewhere is not trained again.
    """
    first = manifest.get("first_machine")
    return first["machine"] if first and first["base"] == _known(model) else None


def keep_first_machine(manifest: dict[str, Any], model: Model, now: dict[str, Any]) -> None:
    """Put this machine into the manifest of a run that has none for this base yet."""
    if first_machine(manifest, model) is None:
        manifest["first_machine"] = {"base": _known(model), "machine": now}


def _known(model: Model) -> list[str | None]:
    return [wherever(model.base), model.revision]

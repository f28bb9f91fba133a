"""Figures for a person: a stage's main ones on one line, and how sizes, times and numbers are written."""

from collections.abc import Sequence
from typing import Any

GIB = 2**30


def main_figures(main: Sequence[str], figures: dict[str, Any]) -> str:
    """The main figures of a stage on one line: the manifest has every figure, these are shown.

    Args:
        main: the names of those that tell most, as the stage's declaration has them.
        figures: what the manifest has for the stage.
    """
    names = [name for name in main if figures.get(name) is not None]
    # A stage whose figures have no fixed names, such as shares by rung, shows them all, by these names.
    names = names or [name for name, value in figures.items() if isinstance(value, int | float | str)]
    return ", ".join(
        f"{name.replace('_', ' ') if name in main else name} {written(name, figures[name])}" for name in names
    )


def written(name: str, value: Any) -> str:
    """One value: bytes as a size, counts with separators, other numbers with four digits; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.split("_")[-1] == "bytes":
        return size(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(written(name, item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {written(name, item)}" for key, item in value.items())
    return str(value)


def size(count: int) -> str:
    """Bytes for a person: "145.0 MB", in powers of 1000."""
    from rich.filesize import decimal

    return decimal(count)


def memory_size(count: float) -> str:
    """Bytes in powers of 1024: "24 GiB", as memory is sold. Set-up can ask this before any library is there."""
    return f"{f'{count / GIB:,.1f}'.removesuffix('.0')} GiB"


def peak_memory(record: dict[str, Any]) -> str:
    """A stage's peak memory, with a GPU's where it used one: "2.1 GB, GPU 9.8 GB".

    Args:
        record: what the manifest, or `status`, has for the stage.
    """
    gpu = record["figures"].get("peak_gpu_bytes")
    return size(record["peak_memory_bytes"]) + (f", GPU {size(gpu)}" if gpu else "")


def duration(seconds: float) -> str:
    """Seconds for a person: "4.2 s", "8 min 20 s", "5 h 3 min"."""
    whole = round(seconds)
    if whole >= 3600:
        return "{} h {} min".format(*divmod(round(seconds / 60), 60))
    if whole >= 60:
        return "{} min {} s".format(*divmod(whole, 60))
    return f"{seconds:.1f} s"

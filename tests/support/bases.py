"""Small random bases of real architectures with real tokenizers, each made once for a test run."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks import small_base
from benchmarks.families import FAMILIES
from support.small_models import scratch


def tokenizer_files(name: str, folder: Path, **more: Any) -> Path:
    """Copy the files of a pinned tokenizer into a folder; `more` as `small_base.tokenizer_files` takes it."""
    try:
        return small_base.tokenizer_files(name, folder, **more)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@cache
def base(name: str, tokenizer: str, model_type: str = "llama", **more: Any) -> Path:
    """A small base.

    Args:
        name: of its folder.
        tokenizer: the pinned one that it has.
        model_type: the architecture, as config.json names it.
        more: as `benchmarks.small_base.write_small_base` takes it.
    """
    folder = scratch() / f"base-{name}"
    tokenizer_files(tokenizer, folder)
    return small_base.write_small_base(folder, tokenizer, model_type, **more)


def family(name: str) -> Path:
    """The small base of a family of the table."""
    family = FAMILIES[name]
    more = {"chat_template": family.chat_template, "added": family.added, "taking": family.taking}
    return base(f"family-{name}", family.tokenizer, family.model_type, **more)

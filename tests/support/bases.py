"""Small random bases of real architectures with real tokenizers, each made once for a test run."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks import small_base
from benchmarks.families import FAMILIES
from pipeline.prompt.control_tokens import CONTROL_WORDS
from support.small_models import scratch

MERGES = 2000  # of a short tokenizer


def tokenizer_files(name: str | Path, folder: Path, **more: Any) -> Path:
    """Copy the files of a pinned tokenizer into a folder; `more` as `small_base.tokenizer_files` takes it."""
    try:
        return small_base.tokenizer_files(name, folder, **more)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@cache
def short(name: str) -> Path:
    """The folder of a pinned tokenizer with a few thousand of its words, which loads in no time.

    It splits, normalises and marks texts as the whole one does, with other ids. llama.cpp's converter knows none.
    """
    folder = tokenizer_files(name, scratch() / f"short-{name}")
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    model, added = whole["model"], whole["added_tokens"]
    assert model["type"] == "BPE"
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    merged, added_words = {left + right for left, right in merges}, [token["content"] for token in added]
    kept, first = set(added_words) | CONTROL_WORDS & model["vocab"].keys() | (model["vocab"].keys() - merged), []
    for left, right in merges[:MERGES]:
        if left in kept and right in kept:
            first.append((left, right))
            kept.add(left + right)
    words = sorted(kept & model["vocab"].keys(), key=model["vocab"].get)
    model["vocab"] = {word: id for id, word in enumerate(words)}
    model["merges"] = [" ".join(merge) if isinstance(model["merges"][0], str) else merge for merge in first]
    ids = {word: id for id, word in enumerate(dict.fromkeys([*words, *added_words]))}
    for token in added:
        token["id"] = ids[token["content"]]
    _renumber(whole["post_processor"], ids)
    path.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in settings:
        known = {ids[token["content"]]: token for token in settings["added_tokens_decoder"].values()}
        settings_path.write_text(json.dumps(settings | {"added_tokens_decoder": known}), encoding="utf-8")
    return folder


def _renumber(part: Any, ids: dict[str, int]) -> None:
    """Give the tokens that a post-processor writes their new ids."""
    if isinstance(part, dict):
        if "tokens" in part and "ids" in part:
            part["ids"] = [ids[token] for token in part["tokens"]]
        for value in part.values():
            _renumber(value, ids)
    elif isinstance(part, list):
        for value in part:
            _renumber(value, ids)


@cache
def base(name: str, tokenizer: str | Path, model_type: str = "llama", **more: Any) -> Path:
    """A small base.

    Args:
        name: of its folder.
        tokenizer: the pinned one that it has, or the folder of one.
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

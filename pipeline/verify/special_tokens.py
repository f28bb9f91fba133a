"""special tokens: a folder says the same of EOS, BOS and padding wherever it says it.

llama.cpp takes them from the tokenizer, transformers from generation_config.json or, where there is none, config.json,
vLLM from both. With a wrong EOS in one of them some servers stop and others never do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.model.config_file import text_settings
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result

_FILES = ("config.json", "generation_config.json")
_EOS = Claim("special_tokens.eos", "merge", "config.json, generation_config.json and the tokenizer agree on EOS")
_BOS = Claim("special_tokens.bos", "merge", "config.json, generation_config.json and the tokenizer agree on BOS")
_PAD = Claim("special_tokens.pad", "merge", "config.json, generation_config.json and the tokenizer agree on padding")


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge the folder that the GGUF files were made from."""
    tokenizer, said = artefacts.tokenizer, {name: _read(artefacts.model / name) for name in _FILES}
    for claim, key, own in (
        (_EOS, "eos_token_id", tokenizer.eos_token_id),
        (_BOS, "bos_token_id", tokenizer.bos_token_id),
        (_PAD, "pad_token_id", tokenizer.pad_token_id),
    ):
        wrong = [
            words for name, values in said.items() if (words := _wrong(tokenizer, name, key, values.get(key), own))
        ]
        # The one that is used, where answers are to end at more tokens than the tokenizer's one.
        ends = _ids(said["generation_config.json"].get(key)) if key == "eos_token_id" else []
        if own in ends and set(_ids(said["config.json"].get(key))) <= set(ends):
            wrong = []
        yield claim.holds(not wrong, "; ".join(wrong), len(wrong), "at most 0")


def _read(path: Path) -> dict[str, Any]:
    return text_settings(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _ids(value: Any) -> list[int]:
    return [item for item in (value if isinstance(value, list) else [value]) if item is not None]


def _wrong(tokenizer: Any, name: str, key: str, value: Any, own: int | None) -> str:
    """What is wrong with one file's ids, in words; "" where it says none, or the tokenizer has none."""
    ids = _ids(value)
    if beyond := [number for number in ids if not 0 <= number < len(tokenizer)]:
        return f"{name}: {key} = {beyond[0]:,}, and the tokenizer has {len(tokenizer):,} tokens"
    if own is None or not ids or own in ids:
        return ""
    meant = ", ".join(f"{number} ({tokenizer.convert_ids_to_tokens(number)!r})" for number in ids)
    return f"{name}: {key} = {meant}, the tokenizer's is {own} ({tokenizer.convert_ids_to_tokens(own)!r})"

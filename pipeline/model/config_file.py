"""The config.json of a model: what it says of the language model in it, which may stand in a part of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a model may take in beside text, by the part of its config.json.
SENSES = {"vision_config": "images", "audio_config": "sound"}


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language model: those of `text_config`, which multimodal models have, before the others.

    Example: Gemma 3 has "max_position_embeddings" in text_config only, and "tie_word_embeddings" at the top.
    """
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, dict) else {})}


def text_config(folder: Path) -> dict[str, Any]:
    """The settings of the language model in a model's folder.

    Raises:
        OSError, ValueError: config.json is missing, or is no JSON.
    """
    return text_settings(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def senses(settings: Mapping[str, Any]) -> list[str]:
    """What a model takes in beside text, in words."""
    return [what for part, what in SENSES.items() if settings.get(part)]


def write_vocabulary(path: Path, rows: int) -> None:
    """Change how many rows the embedding has, in a config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    holder = config["text_config"] if "vocab_size" in config.get("text_config", {}) else config
    holder["vocab_size"] = rows
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def context_length(settings: Mapping[str, Any]) -> int | None:
    """The longest sequence that a model was made for, in tokens; None where its configuration does not say."""
    length = text_settings(settings).get("max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else None

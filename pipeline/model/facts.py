"""How large a base is, how long its context and how it is stored, learned from headers: no weights are downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.hub import reach_hub
from pipeline.model.config_file import context_length, text_config
from pipeline.model.weights_file import read_weights
from pipeline.resources import expanded

if TYPE_CHECKING:
    from pipeline.config import Model


def facts(base: str, revision: str | None = None) -> tuple[int | None, int | None]:
    """The number of weights and the context length in tokens of a base; None for what cannot be learned.

    Args:
        base: a packaged name, a hub id, a local folder or a GGUF file, as in [model] base.
        revision: branch, tag or commit of a hub id.
    """
    from pipeline.model.base import cached_base, is_on_hub, resolve_base
    from pipeline.model.gguf_base import facts_of, is_gguf
    from pipeline.model.packaged import PACKAGED

    if base.lower() not in PACKAGED and is_gguf(path := expanded(base, "model.base")):
        return facts_of(path)
    if is_on_hub(base):
        # The cache first: the defaults of a finished run must not change when its hub cannot be reached.
        folder = cached_base(base, revision)
        if folder is None:
            return _hub_facts(base, revision)
    else:
        folder = resolve_base(base, revision)
    return read_weights(folder).stored_values, context_of(folder)


def stored_in_4bit(model: Model) -> bool:
    """Whether a base is stored in bitsandbytes' 4 bits; of a hub id that cannot be looked up, no."""
    from pipeline.model.base import is_on_hub
    from pipeline.model.four_bit import is_4bit

    if is_on_hub(model.base):
        config = _hub_config(model.base, model.revision)
        return config is not None and is_4bit(config.parent)
    folder = expanded(model.base, "model.base")
    return (folder / "config.json").is_file() and is_4bit(folder)  # packaged bases and GGUF files unpack to 16 bits


def _hub_config(base: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if isinstance(cached := try_to_load_from_cache(base, "config.json", revision=revision), str):
        return Path(cached)
    reach_hub()
    try:
        return Path(hf_hub_download(base, "config.json", revision=revision))
    except Exception:  # offline, gated or unknown: resolving the base will say why
        return None


def context_of(folder: Path) -> int | None:
    """The context length in tokens that a model's folder names."""
    return context_length(text_config(folder))


def _hub_facts(base: str, revision: str | None) -> tuple[int | None, int | None]:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    reach_hub()
    try:
        metadata = get_safetensors_metadata(base, revision=revision)
        config = hf_hub_download(base, "config.json", revision=revision)
    except Exception:  # offline, gated or unknown: the defaults can do without, and resolving the base will say why
        return None, None
    return sum(metadata.parameter_count.values()), context_length(json.loads(Path(config).read_text(encoding="utf-8")))


def base_files(model: Model) -> list[Path]:
    """The files of a base that decide what is trained: configuration, weights, tokenizer, chat template, run code."""
    from pipeline.model.base import resolve_base
    from pipeline.prompt.chat_templates import template_file

    folder = resolve_base(model.base, model.revision)
    kinds = {".json", ".safetensors", ".jinja", ".model"}
    found = [path for path in folder.iterdir() if path.suffix in kinds or path.name == "merges.txt"]
    code = list(folder.rglob("*.py")) if model.trust_remote_code else []
    return [*sorted(found + code), template_file(model.chat_template)]

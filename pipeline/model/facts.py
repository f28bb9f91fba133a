"""How large a base is and how long its context, learned from headers alone: no weights are read or downloaded."""

import json
import math
import struct
from pathlib import Path

from pipeline.config import Model
from pipeline.model.four_bit import PART
from pipeline.resources import expanded


def facts(base: str, revision: str | None = None) -> tuple[int | None, int | None]:
    """The number of weights and the context length in tokens of a base; None for what cannot be learned.

    Args:
        base: a packaged name, a hub id or a local folder, as in [model] base.
        revision: branch, tag or commit of a hub id.
    """
    from pipeline.model.base import cached_base, resolve_base
    from pipeline.model.packaged import PACKAGED

    if base.lower() not in PACKAGED and "/" in base and not expanded(base, "model.base").exists():
        # The cache first: the defaults of a finished run must not change when its hub cannot be reached.
        folder = cached_base(base, revision)
        if folder is None:
            return _hub_facts(base, revision)
    else:
        folder = resolve_base(base, revision)
    return sum(_count(path) for path in _weights(folder)) or None, context_of(folder)


def context_of(folder: Path) -> int | None:
    """The context length in tokens that a model's folder names."""
    return _context(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _weights(folder: Path) -> list[Path]:
    """The files that make up the model, as the hub counts them: some folders hold the weights a second time."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [folder / name for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())]
    return list(folder.glob("*.safetensors"))


def _count(path: Path) -> int:
    """The number of values in a safetensors file, from its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    # bitsandbytes packs two values of 4 bits into a byte, and keeps what unpacks them beside it.
    return sum(
        math.prod(entry["shape"]) * (2 if entry["dtype"] == "U8" else 1)
        for name, entry in header.items()
        if name != "__metadata__" and not PART.match(name)
    )


def _hub_facts(base: str, revision: str | None) -> tuple[int | None, int | None]:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        metadata = get_safetensors_metadata(base, revision=revision)
        config = hf_hub_download(base, "config.json", revision=revision)
    except Exception:  # offline, gated or unknown: the defaults can do without, and resolving the base will say why
        return None, None
    return sum(metadata.parameter_count.values()), _context(json.loads(Path(config).read_text(encoding="utf-8")))


def _context(config: dict[str, object]) -> int | None:
    text = config.get("text_config")
    length = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def base_files(model: Model) -> list[Path]:
    """The files of a base that decide what is trained: configuration, weights, tokenizer, chat template."""
    from pipeline.model.base import resolve_base
    from pipeline.prompt.chat_templates import template_file

    folder = resolve_base(model.base, model.revision)
    kinds = {".json", ".safetensors", ".jinja", ".model"}
    return [*sorted(path for path in folder.iterdir() if path.suffix in kinds), template_file(model.chat_template)]

"""The base of a fine-tune as a folder: safetensors in 16 bits or bitsandbytes' 4, config.json, and a fast tokenizer.

`[model] base` is a packaged name, a hub id, a local folder or a GGUF file. Whichever it is, every later stage sees a
folder, and one that cannot work - pickled weights, weights quantized otherwise, no tokenizer - is refused here, by
name.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Model
from pipeline.errors import UserError
from pipeline.hub import asking
from pipeline.model.four_bit import in_4bit
from pipeline.model.gguf_base import gguf_folder, is_gguf, quantized_type
from pipeline.model.packaged import PACKAGED, packaged_folder
from pipeline.model.sentencepiece_file import write_sentencepiece
from pipeline.model.weights_file import read_weights
from pipeline.resources import expanded

# What is fetched from a hub. Pickled weights and Python files are not: they can run code.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE*", "NOTICE*")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
WEIGHT_TYPES = ("F16", "BF16", "F32")


def resolve_base(base: str, revision: str | None = None) -> Path:
    """The folder of a base.

    Args:
        base: a packaged model's name, a hub id ("owner/name"), a local folder, or a GGUF file.
        revision: a hub id's branch, tag or commit.

    Returns:
        A folder with config.json, safetensors and tokenizer files.

    Raises:
        UserError: there is no such base, or it cannot be fine-tuned and merged, and why.
        PipelineError: it cannot be fetched or unpacked.
    """
    if base.lower() in PACKAGED:
        if revision is not None:
            raise UserError(f"model.revision: the packaged {base} has no revisions; remove the key")
        return packaged_folder(PACKAGED[base.lower()])
    local = expanded(base, "model.base")
    if local.is_dir():
        if revision is not None:
            raise UserError(f"model.revision: {base} is a local folder; a revision belongs to a hub id")
        return check_base(local.resolve())
    if is_gguf(local):
        if revision is not None:
            raise UserError(f"model.revision: {base} is a local file; a revision belongs to a hub id")
        return gguf_folder(local.resolve())
    if local.is_file():
        raise UserError(
            f"model.base: {base} is a file, and no GGUF; give the folder that holds config.json and *.safetensors"
        )
    if base.lower().endswith(".gguf"):
        raise UserError(f"model.base: {base}: no such file")
    if is_hub_id(base):
        return check_base(_from_hub(base, revision))
    nearest = difflib.get_close_matches(base.lower(), PACKAGED, 1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"packaged are: {', '.join(PACKAGED)}"
    raise UserError(f"model.base: {base}: no such folder, no packaged model and no hub id (owner/name); {hint}")


def base_folder(model: Model) -> Path:
    """The folder of [model]: its base, with the tokens that it is given.

    Raises:
        UserError, PipelineError: as `resolve_base` and `with_added_tokens`.
    """
    from pipeline.model.added_tokens import with_added_tokens

    return with_added_tokens(resolve_base(model.base, model.revision), model)


def rounded_before(base: str) -> str:
    """What to know of a base's weights before they are trained, in a sentence; "" where there is nothing."""
    path = expanded(base, "model.base")
    if base.lower() in PACKAGED or not is_gguf(path) or not (kind := quantized_type(path)):
        return ""
    return (
        f"model.base: {path.name}: its weights were rounded to {kind} before training began, and what that lost is not "
        "in the result either; the original model would be better, where it can be had"
    )


def as_trained(base: Path, tokenizer: Any, folder: Path) -> Path:
    """The untouched base with the tokenizer that it is trained with: what a merge of nothing would leave.

    Args:
        base: its folder; links to its files are made.
        tokenizer: of transformers.
        folder: a new one.
    """
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.model",
        "*.safetensors",
        "*.safetensors.index.json",
    ):
        for path in base.glob(name):
            (folder / path.name).symlink_to(path.resolve())
    write_sentencepiece(folder)
    return folder


def is_hub_id(base: str) -> bool:
    """Whether a base's name is as a hub has them, owner/name."""
    return re.fullmatch(r"(?!\.)[\w.-]+/[\w.-]+", base) is not None


def is_on_hub(base: str) -> bool:
    """Whether a base, which is neither packaged nor on this machine, is looked for on the hub."""
    known = base.lower() in PACKAGED or base.lower().endswith(".gguf")
    return not known and is_hub_id(base) and not expanded(base, "model.base").exists()


def cached_base(base: str, revision: str | None = None) -> Path | None:
    """The folder of a hub id, if the hub's cache has the whole base already; the hub is not asked."""
    from huggingface_hub import snapshot_download

    patterns = list(HUB_PATTERNS)
    try:
        folder = snapshot_download(base, revision=revision, allow_patterns=patterns, local_files_only=True)
        return check_base(Path(folder))  # there may be single files of it only
    except (OSError, ValueError, UserError):
        return None


def config_folder(base: str, revision: str | None = None) -> Path:
    """A folder with the config.json of a base: of a hub id nothing else is fetched.

    Raises:
        UserError, PipelineError: as `resolve_base`.
    """
    if is_on_hub(base):
        return cached_base(base, revision) or _from_hub(base, revision, ("config.json",))
    return resolve_base(base, revision)


def _from_hub(base: str, revision: str | None, patterns: Sequence[str] = HUB_PATTERNS) -> Path:
    from huggingface_hub import snapshot_download

    with asking("model.base", base, revision, f"a local folder, or the packaged {' or '.join(PACKAGED)}"):
        return Path(snapshot_download(base, revision=revision, allow_patterns=list(patterns)))


def check_base(folder: Path) -> Path:
    """Return the folder if it is a base that can be trained, merged and converted.

    Raises:
        UserError: what is missing or wrong in it, and what to do.
    """
    where = f"model.base: {folder}"
    config_file = folder / "config.json"
    weights = sorted(folder.glob("*.safetensors"))
    if not config_file.is_file():
        if list(folder.glob("*.gguf")):
            raise UserError(
                f"{where} holds only GGUF: give one of its files itself, or the model's original folder or hub id"
            )
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{where} holds an adapter, not a model: give the base that the adapter was trained on")
        raise UserError(f"{where} has no config.json: give the folder of a model as `save_pretrained` writes it")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: config.json cannot be read: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{where}: config.json names no model_type: it is not the configuration of a model")
    if (quantization := config.get("quantization_config")) and not (
        isinstance(quantization, dict) and in_4bit(quantization)
    ):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        bits = " in 8 bits" if isinstance(quantization, dict) and quantization.get("load_in_8bit") else ""
        raise UserError(
            f"{where} is already quantized ({method or 'quantization_config'}{bits} in config.json). Give the 16-bit "
            "model that it was made from, which training quantizes by itself, or one in bitsandbytes' 4 bits"
        )
    if not weights:
        if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
            raise UserError(
                f"{where} has its weights only as {pickled[0].name}, a pickle, which can run code when it is "
                "read: save the model as safetensors (`save_pretrained`) and give that folder"
            )
        raise UserError(f"{where} has no *.safetensors: the weights are missing")
    _check_weights(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{where} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}): copy the tokenizer's files of the "
            "model into it"
        )
    return folder


def _check_weights(folder: Path) -> None:
    """Every shard is there, whole, and holds 16- or 32-bit weights."""
    try:
        weights = read_weights(folder)
    except UserError as error:
        raise UserError(f"model.base: {error}") from None
    for path in weights.files:
        types = {weights.types[name] for name, file in weights.file_of.items() if file == path}
        if types and not types & set(WEIGHT_TYPES):
            raise UserError(
                f"model.base: {folder}: {path.name} holds {', '.join(sorted(types))} weights: a base must be stored in "
                "16 or 32 bits"
            )

"""The 16-bit weights that an adapter becomes part of: the base's, what NF4 leaves of them, or those of `merge.model`.

An adapter that was trained on the NF4 of a 16-bit base has two bases, which it can be asked on and merged into.

A base that is stored in 4 bits is trained as it is. Its adapter is merged into what its weights unpack to, which is
what it saw, or into the 16-bit model that they were made of, where `merge.model` names that. Whether it is that model
is looked at: its architecture, every tensor's name and shape, and how far two of its matrices are from the 4 bits'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, UserError
from pipeline.model.base import base_folder, cached_base, is_on_hub, resolve_base
from pipeline.model.config_file import text_config
from pipeline.model.facts import base_files, facts, stored_in_4bit
from pipeline.model.four_bit import Packed, in_16bit, is_4bit
from pipeline.model.memory import sixteen_bit_file
from pipeline.model.weights_file import read_weights
from pipeline.processes import require_space
from pipeline.setup.machine import existing

if TYPE_CHECKING:
    from pipeline.config import Config, Model

# What computes otherwise with weights of the same shapes.
_COMPUTES = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "rope_parameters", "sliding_window", "tie_word_embeddings",
)  # fmt: skip
# |W - unpacked| / |W|. NF4 leaves 0.09 of normally distributed weights, FP4 0.13; another model's are at 1.4.
_FAR = 0.3


def has_two_bases(config: Config) -> bool:
    """Whether the adapter is trained on the NF4 of a base that is stored in 16 bits."""
    return config.train.load_in_4bit and not stored_in_4bit(config.model)


def chosen_base(config: Config) -> tuple[str, str] | None:
    """The weights that the adapter is merged into, "16bit" or "dequantized", and why; None: the lower loss chooses."""
    if config.merge.model is not None:
        return "16bit", f"merge.model names it: {config.merge.model}"
    if not has_two_bases(config):
        if stored_in_4bit(config.model):
            return "dequantized", "the base is stored in 4 bits"
        return "16bit", "the adapter was trained on the 16-bit base"
    if config.export.as_ == "adapter":
        return "16bit", "the adapter is served on the base as it is stored"
    if config.merge.base != "auto":
        return config.merge.base, "merge.base says so"
    return None


def sixteen_bit_base(config: Config, target: Path) -> Path:
    """The folder of the 16-bit weights that the adapter becomes part of.

    Args:
        config: the configuration.
        target: where the weights of a base in 4 bits are unpacked; what lies there is replaced.

    Raises:
        UserError: `merge.model` is not the base's model in 16 bits.
    """
    base = base_folder(config.model)
    return in_16bit(base, target) if config.merge.model is None else _named(base, config)


def merge_files(config: Config) -> list[Path]:
    """The files that decide what a merge gives: the base's, and those of `merge.model`."""
    files = base_files(config.model)
    if (name := config.merge.model) is not None:
        _refuse_sixteen_bits(resolve_base(config.model.base, config.model.revision), name)
        with _told_of_merge_model(name):
            files += base_files(_merge_into(config))
    return files


def check_bits(base: Path, config: Config) -> None:
    """Refuse what does not go with a base that is stored in 4 bits, and `merge.model` where it does not go with it.

    Raises:
        UserError: with the key.
    """
    if is_4bit(base):
        stored = f"model.base: {base} is stored in 4 bits"
        if not config.train.load_in_4bit and not config.given_adapters:
            raise UserError(
                f"train.load_in_4bit = false: {stored}: remove the key, or give the 16-bit model as the base"
            )
        if config.merge.base == "16bit" and config.merge.model is None:
            raise UserError(
                f'merge.base = "16bit": {stored}, and an adapter on it is merged into what they unpack to: remove the '
                "key, name the 16-bit model in merge.model, or give the 16-bit model as the base"
            )
    if config.merge.model is not None:
        _named(base, config)


def _named(base: Path, config: Config) -> Path:
    """The folder of `merge.model`, which is the base's model in 16 bits."""
    name = config.merge.model
    assert name is not None
    _refuse_sixteen_bits(base, name)
    with _told_of_merge_model(name):
        folder = base_folder(_merge_into(config))
    if is_4bit(folder):
        raise UserError(f"merge.model: {name} is stored in 4 bits too: give the 16-bit model, or remove the key")
    if why := _differs(base, folder):
        raise UserError(
            f"merge.model: {name} is not the 16-bit model of {base}: {why}. Give the model that it was quantized "
            "from, or remove the key, and the adapter is merged into what the 4 bits unpack to"
        )
    return folder


def _merge_into(config: Config) -> Model:
    """`merge.model`, with the base's new tokens."""
    return config.model.model_copy(update={"base": config.merge.model, "revision": None})


def _refuse_sixteen_bits(base: Path, name: str) -> None:
    if not is_4bit(base):
        raise UserError(
            f"merge.model: {name}: model.base: {base} is in 16 bits itself, and is what is merged into: remove the key"
        )


@contextmanager
def _told_of_merge_model(name: str) -> Iterator[None]:
    """What is wrong with it is said under its key; a hub's model is fetched where there is room for it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        if is_on_hub(name) and cached_base(name) is None and (parameters := facts(name)[0]):
            require_space(existing(Path(HF_HUB_CACHE)), sixteen_bit_file(parameters), f"merge.model ({name})")
        yield
    except PipelineError as error:
        raise type(error)(str(error).replace("model.base:", "merge.model:")) from None


def _differs(base: Path, named: Path) -> str:
    """What tells a model in 16 bits from that of a base in 4; "" where nothing does."""
    ours, theirs = (_settings(folder) for folder in (base, named))
    for key in _COMPUTES:
        if ours.get(key) != theirs.get(key):
            return f"its {key} is {theirs.get(key)}, the base's {ours.get(key)}"
    packed, weights = Packed(read_weights(base)), read_weights(named)
    shapes, others = packed.own_shapes, weights.own_shapes
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            return f"its tensor {name} is {others.get(name, 'not there')}, the base's {shapes.get(name, 'not there')}"
    names = sorted(packed.parts)
    for name in {names[0], names[-1]} if names else ():
        weight = weights[name].float()
        far = float((weight - packed[name].float()).norm() / weight.norm())
        if not far <= _FAR:
            return f"its {name} is {far:.0%} away from the base's, which 4 bits do not explain"
    return ""


def _settings(folder: Path) -> dict[str, Any]:
    """config.json as transformers understands it: old keys and new ones are the same."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    return {"tie_word_embeddings": text_config(folder).get("tie_word_embeddings", False)} | {
        key: getattr(config, key, None) for key in _COMPUTES if key != "tie_word_embeddings"
    }

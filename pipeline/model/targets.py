"""Which modules get an adapter: found in the model itself, by what a module is and not by what Llama calls it.

Every architecture names its parts otherwise, and some join them: Phi-3 has one matrix for query, key and value, GPT-2
keeps its matrices transposed, DeepSeek makes queries in two steps. Where a module lies says what it is: below a
decoder's layers, inside the attention or outside. No weights are needed for that: a model on torch's meta device has
all names and shapes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Lora
from pipeline.errors import UserError
from pipeline.model.config_file import text_settings
from pipeline.model.quiet import quiet_transformers

# For names of these alone PEFT is told short names, which Unsloth has fast code for.
_LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_LAYER = re.compile(r"\.\d+\.")
_ATTENTION = re.compile(r"(^|[._])(attn|attention)(\.|$)")
# Query and value; where they are joined with the key, or made in steps, all that they are made of.
_QUERY_OR_VALUE = re.compile(r"(q|v|qkv|kv|query|value|c_attn|Wqkv|in_proj)(_|$)")
# Which expert is asked, and recurrences, whose kernels read the weights past an adapter.
_NEVER = re.compile(r"(^|\.)(gate|router|shared_expert_gate|mamba|ssm)(\.|$)")
# In a mixture whose experts are one tensor PEFT makes these its experts' (its utils/transformers_weight_conversion.py).
_TAKEN_FOR_EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
# What a language model is not, in the names of a vision-language model's parts.
OTHER_SENSES = re.compile(r"vision|visual|audio|speech|image|projector|connector|merger|multi_modal")


@dataclass(frozen=True)
class Targets:
    """The modules that get an adapter.

    Attributes:
        modules: their full names in the model's order, each with (values in, values out).
        peft: what makes PEFT choose exactly these: short names, or one regular expression for full names.
        experts: tensors of experts that "all" means too, and that are not trained; nor is the feed-forward beside them.
        saved: the modules that are trained whole, each with (rows, values in a row); a tied head is in its embedding.
        by_row: of embedding and head, those of which only the rows of added tokens are trained: values in a row.
        tied: the head is the embedding.
    """

    modules: dict[str, tuple[int, int]]
    peft: list[str] | str
    experts: tuple[str, ...] = ()
    saved: dict[str, tuple[int, int]] = field(default_factory=dict)
    by_row: dict[str, int] = field(default_factory=dict)
    tied: bool = False

    @property
    def names(self) -> list[str]:
        """What the modules are called within their layers, in the model's order."""
        return _short(self.modules)

    def parameters(self, lora: Lora, added: int = 0) -> int:
        """How many values are trained, biases aside: r (in + out) each, DoRA's magnitudes, and what is trained whole.

        Args:
            lora: the configuration.
            added: how many tokens the base is given.
        """
        adapter = sum(lora.r * (inner + outer) + lora.dora * outer for inner, outer in self.modules.values())
        whole = sum(rows * width for rows, width in self.saved.values())
        return adapter + whole + added * sum(self.by_row.values())

    def peft_arguments(self, rows: list[int]) -> dict[str, Any]:
        """What PEFT is told beside the modules that get an adapter.

        Args:
            rows: those of the added tokens.
        """
        more: dict[str, Any] = {}
        if self.saved:
            more["modules_to_save"] = [name.rpartition(".")[2] for name in self.saved]
            more["ensure_weight_tying"] = self.tied
        if rows and self.by_row:
            more["trainable_token_indices"] = dict.fromkeys(self.by_row, rows)
        return more


def of_base(folder: Path, lora: Lora, *, trust_remote_code: bool = False) -> Targets:
    """The modules of a base as merge loads it; no weights are read.

    Raises:
        UserError: as `find` and `without_weights`.
    """
    return find(without_weights(folder, trust_remote_code=trust_remote_code), lora)


def without_weights(folder: Path, *, trust_remote_code: bool = False, place: Any = None) -> Any:
    """A base's model on torch's meta device: all names and shapes, no numbers.

    Args:
        folder: the base's.
        trust_remote_code: run its own Python code.
        place: a context that puts less of it there.

    Raises:
        UserError: transformers does not know the architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with place or torch.device("meta"), quiet_transformers():
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.base: {folder}: transformers cannot build this model: {error}") from None


def in_layers(model: Any) -> dict[str, tuple[int, int]]:
    """The linear modules of the language model's layers: full name -> (values in, values out)."""
    linear = ((name, _shape(module)) for name, module in model.named_modules() if _LAYER.search(name))
    return {name: shape for name, shape in linear if shape is not None and not OTHER_SENSES.search(name)}


def vocabulary_modules(model: Any) -> tuple[str, str]:
    """The full names of a model's embedding and of its head; "" for a head that is the embedding (tied)."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = head is None or bool(text_settings(model.config.to_dict()).get("tie_word_embeddings", False))
    return names[id(embedding)], "" if tied else names[id(head)]


def find(model: Any, lora: Lora) -> Targets:
    """The modules of a model that `lora.target_modules` and `lora.exclude` choose.

    Args:
        model: of transformers, on any device.
        lora: the configuration.

    Raises:
        UserError: a name means no module, or one that text does not reach; or no module is left.
    """
    every = [name for name, _ in model.named_modules()]
    linear = {name: shape for name, module in model.named_modules() if (shape := _shape(module)) is not None}
    text = in_layers(model)
    wanted = lora.target_modules
    experts = tuple(
        name
        for name, _ in model.named_parameters()  # their shapes tell nothing: Unsloth packs them in 4 bits on a GPU
        if ".experts." in name and name.rpartition(".")[0] not in linear
    )
    if experts:
        text = {name: shape for name, shape in text.items() if name.rpartition(".")[2] not in _TAKEN_FOR_EXPERTS}
    if isinstance(wanted, str):
        chosen = {name for name in text if _is(wanted, _within(name))}
    else:
        chosen = _matching("lora.target_modules", wanted, text, linear)
    chosen -= _matching("lora.exclude", lora.exclude, text, linear)
    modules = {name: shape for name, shape in text.items() if name in chosen}
    if not modules:
        raise UserError(f"lora.target_modules: no module is left to train; the base has {', '.join(_short(text))}")
    saved, by_row, tied = _whole(model, lora.save_modules)
    return Targets(modules, names_for(modules, every), experts if wanted == "all" else (), saved, by_row, tied)


def _whole(model: Any, wanted: tuple[str, ...]) -> tuple[dict[str, tuple[int, int]], dict[str, int], bool]:
    """What of embedding and head is trained whole, what by the row, and whether they are one."""
    embedding, head = vocabulary_modules(model)
    key = "lora.save_modules"
    if wanted and not head:
        if len(set(wanted)) == 1:
            raise UserError(
                f'{key} = ["{wanted[0]}"]: the base\'s head is its embedding (tied), and a merge would change both: '
                f'name both, {key} = ["embed_tokens", "lm_head"], and they are trained as the one that they are'
            )
        if embedding.rpartition(".")[2] != "embed_tokens":
            raise UserError(
                f"{key}: Unsloth would train {embedding} apart from the head that it is tied to: leave the key out, or "
                "give a base with a head of its own"
            )
    chosen = {module for name, module in (("embed_tokens", embedding), ("lm_head", head)) if module and name in wanted}
    shapes = {
        embedding: tuple(model.get_input_embeddings().weight.shape),
        **({head: tuple(model.get_output_embeddings().weight.shape)} if head else {}),
    }
    saved = {name: shape for name, shape in shapes.items() if name in chosen}
    return saved, {name: shape[1] for name, shape in shapes.items() if name not in chosen}, not head


def names_for(modules: Iterable[str], every: Iterable[str]) -> list[str] | str:
    """What makes PEFT choose exactly these modules among all of a model: short names, or one regular expression."""
    return _names(modules, every) or _pattern(modules, every)


def _shape(module: Any) -> tuple[int, int] | None:
    """(in, out) of what LoRA can be put on: a linear module, or GPT-2's, whose weight is transposed."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None


def _is(preset: str, within: str) -> bool:
    """Whether a module, by its name within a layer, is meant by a preset."""
    if _NEVER.search(within):
        return False
    attention = bool(_ATTENTION.search(within.rpartition(".")[0]))
    if preset == "minimal":
        return attention and bool(_QUERY_OR_VALUE.match(within.rpartition(".")[2]))
    return preset == "all" or attention


def _matching(key: str, wanted: Iterable[str], text: Iterable[str], linear: Iterable[str]) -> set[str]:
    """The modules that any of these means: what a name ends with, a full name, or a regular expression for one.

    Args:
        key: where they were given.
        wanted: what was given.
        text: the modules that there are to choose from.
        linear: those that lie elsewhere too.

    Raises:
        UserError: one means none.
    """
    found: set[str] = set()
    for given in wanted:
        try:
            pattern = re.compile(rf"(.*\.)?{re.escape(given)}|{given}")
        except re.error as error:
            raise UserError(f"{key}: {given!r} is no regular expression: {error}") from None
        means = {name for name in text if pattern.fullmatch(name)}
        if elsewhere := [name for name in linear if not means and pattern.fullmatch(name)]:
            raise UserError(f"{key}: {given} means {elsewhere[0]}, which is not in the layers that rows of text train")
        if not means:
            names = _short(text)
            near = difflib.get_close_matches(given, names, 1)
            hint = f"did you mean {near[0]}? It" if near else "it"
            raise UserError(f"{key}: the base has no module named {given}; {hint} has {', '.join(names)}")
        found |= means
    return found


def _within(name: str) -> str:
    return _LAYER.split(name)[-1]


def _short(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _names(modules: Iterable[str], every: Iterable[str]) -> list[str]:
    """Short names by which PEFT chooses exactly these modules among all of a model; none if there are no such."""
    names = _short(modules)
    same = {name for name in every if name.rpartition(".")[2] in names} == set(modules)
    return names if same and _LLAMA.issuperset(names) else []


def _pattern(modules: Iterable[str], every: Iterable[str]) -> str:
    """A regular expression that is exactly these modules among all of a model."""
    layers = dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in modules)
    pattern = "|".join(layers)
    if {name for name in every if re.fullmatch(pattern, name)} == set(modules):
        return pattern
    return "|".join(re.escape(name) for name in modules)

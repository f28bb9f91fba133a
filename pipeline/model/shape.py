"""The size of a model by its parts, known from config.json alone: what 4 bits can store, how wide and deep it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.model.config_file import text_settings

if TYPE_CHECKING:
    from pipeline.config import Lora


# Of a layer, as Unsloth finds them (unsloth_zoo's temporary_patches/moe_utils_bnb4bit.py).
_EXPERTS = re.compile(r"\bexperts\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class Shape:
    """How many weights a model has where, and how wide it is.

    Attributes:
        linear: weights of the layers' linear modules, which 4-bit training stores in 4 bits.
        experts: weights of experts that are one tensor of a layer, which it stores so on a GPU alone.
        other: all other weights: embeddings, head, norms, routers, other senses.
        largest: weights of the largest linear module of a layer.
        largest_experts: weights of the largest such tensor; 0 without.
        layers: of the language model.
        hidden: values that a layer takes in for each token.
        intermediate: values inside a layer's feed-forward for each token, of all experts that are asked.
        vocabulary: rows of the embedding.
        trained: values that the adapter trains.
        modules: how many modules the adapter is put on, by their names within a layer.
    """

    linear: int
    experts: int
    other: int
    largest: int
    largest_experts: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    trained: int
    modules: dict[str, int]

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.linear + self.experts + self.other


def shape_of(model: Any, lora: Lora, added: int = 0) -> Shape:
    """The sizes of a base with an adapter.

    Args:
        model: of transformers; `targets.without_weights` makes one from config.json.
        lora: which modules get an adapter, and of what rank.
        added: how many tokens the base is given.

    Raises:
        UserError: `lora.target_modules` means no module.
    """
    from pipeline.model import targets

    chosen = targets.find(model, lora)
    linear = [inner * outer for inner, outer in targets.in_layers(model).values()]
    experts = [of.numel() for name, of in model.named_parameters() if _EXPERTS.search(name)]
    total = sum(parameter.numel() for parameter in model.parameters())
    settings = text_settings(model.config.to_dict())
    hidden = model.config.get_text_config().hidden_size
    names = [name.rpartition(".")[2] for name in chosen.modules]
    return Shape(
        linear=sum(linear),
        experts=sum(experts),
        other=total - sum(linear) - sum(experts),
        largest=max(linear),
        largest_experts=max(experts, default=0),
        layers=model.config.get_text_config().num_hidden_layers,
        hidden=hidden,
        intermediate=_intermediate(settings, hidden),
        vocabulary=model.get_input_embeddings().weight.shape[0],
        trained=chosen.parameters(lora, added),
        modules={name: names.count(name) for name in dict.fromkeys(names)},
    )


def _intermediate(settings: dict[str, Any], hidden: int) -> int:
    experts, width = settings.get("num_experts_per_tok"), settings.get("moe_intermediate_size")
    dense = (
        settings.get("intermediate_size") or settings.get("ffn_hidden_size") or settings.get("n_inner") or 4 * hidden
    )
    return max(dense, experts * (width or dense)) if experts else int(dense)

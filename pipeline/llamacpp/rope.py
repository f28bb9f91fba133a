"""Where llama.cpp turns queries and keys by other angles than they were trained with.

YaRN blends two frequencies over a range of dimensions, whose ends it works out ("YaRN", B. Peng et al., 2023, section
3.2). transformers rounds the ends outwards unless config.json says "truncate": false; llama.cpp always rounds them
(ggml_rope_yarn_corr_dims in its ggml/src/ggml.c), and no key of a GGUF file says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def other_angles(settings: Mapping[str, Any]) -> str:
    """What llama.cpp rounds and transformers does not, in words; "" where both compute the same.

    Args:
        settings: of the language model, as config.json has them.
    """
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) != "yarn" or rope.get("truncate", True):
        return ""
    head = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    width = int(head * rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)))
    positions = rope.get("original_max_position_embeddings") or settings["max_position_embeddings"]
    base = rope.get("rope_theta") or settings["rope_theta"]
    low, high = (
        width * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    )
    if (low, high) == (rounded := (math.floor(low), math.ceil(high))):
        return ""
    return (
        f"llama.cpp blends YaRN's frequencies over the dimensions {rounded[0]} to {rounded[1]}, and this base over "
        f'{low:.2f} to {high:.2f} ("truncate": false in its config.json): every position would be turned by other '
        "angles than were trained, and no key of a GGUF file changes that"
    )

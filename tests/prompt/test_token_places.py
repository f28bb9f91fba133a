"""A text that is tokenized in pieces has the ids that it has as a whole, and its added tokens lie where they lie."""

import json
import random
from functools import cache
from typing import Any

import pytest
from support import bases

from pipeline.prompt.token_places import Located, locate

FAMILIES = ["qwen3", "llama3_1", "gemma2", "llama2", "mistral_nemo", "deepseek_v3", "gpt2"]
WORDS = [
    "a",
    "Be ",
    " c",
    "\n",
    "\n\n",
    "\t",
    "  ",
    "'s",
    "12",
    "é",
    "e\u0301",
    "你",
    ".",
    "▁",
    "<",
    "|",
    ">",
    "<|",
    "[",
    "_",
]


@cache
def family(name: str, **flags: bool) -> Any:
    """A family's tokenizer; with flags for its last added token."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole = json.loads((bases.short(name) / "tokenizer.json").read_text(encoding="utf-8"))
    whole["added_tokens"][-1] |= flags
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)))


def texts_of(tokenizer: Any, chance: random.Random) -> list[str]:
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    some = [*chance.sample(tokens, min(len(tokens), 5)), tokens[-1], tokens[-1][:-1]]
    return ["".join(chance.choices(WORDS + some * 2, k=chance.randrange(12))) for _ in range(100)]


FLAGS = [{flag: True} for flag in ("lstrip", "rstrip", "single_word", "normalized")]


@pytest.mark.parametrize(
    ("name", "flags"), [*((name, {}) for name in FAMILIES), *(("qwen3", one) for one in FLAGS)], ids=str
)
def test_ids_and_places_are_those_of_the_whole_text(name: str, flags: dict[str, bool]) -> None:
    tokenizer = family(name, **flags)
    texts = texts_of(tokenizer, random.Random(name))
    cut = 0
    for text, found in zip(texts, locate(tokenizer, texts), strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found.ids == ids
        whole = Located(tokenizer, text, ids)  # asks for the offsets
        for at in range(len(text) + 1):
            if not text[at : at + 1].isspace():  # which a token may take
                assert found.tail(at) == whole.tail(at)
        cut += found.tail(len(text))[0] > 0
    assert cut > 30 or flags  # without flags these texts are more than one piece

"""Texts that llama.cpp gives other ids than were trained: known one by one, and rows of them refused."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import bases, small_models

from pipeline.data.findings import RowError
from pipeline.llamacpp.converter import command, convert
from pipeline.llamacpp.library import LlamaModel
from pipeline.llamacpp.programs import source_tree
from pipeline.llamacpp.tokenizer_differences import known_habit
from pipeline.model.base import as_trained
from pipeline.prompt.hostile_strings import hostile_strings
from pipeline.prompt.served_ids import refuse_other_ids, split_as_served
from pipeline.prompt.tokenizer import load_tokenizer

OTHERS = (
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f",
)  # Hindi; Arabic with its vowels
SAME = ("All is WELL, isn't it? 1234\n\t", "\u4f60\u597d\uff0c\u4e16\u754c", "\u00e9t\u00e9", "\u2713 \U0001f600")


@cache
def vocabulary(name: str) -> tuple[Path, Any]:
    """A family's tokenizer as a GGUF file, and as it is trained."""
    base = bases.family(name)
    tokenizer, _ = load_tokenizer(base)
    folder = as_trained(base, tokenizer, small_models.scratch() / f"served-ids-{name}")
    file = folder / "vocabulary.gguf"
    convert([*command(folder, file, "f16"), "--vocab-only"], folder)
    return file, tokenizer


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def test_words_are_told_apart_as_llama_cpp_does() -> None:
    """Mistral Nemo's goes the whole way in tests/test_families.py."""
    file, tokenizer = vocabulary("gpt-oss")
    twin = split_as_served(tokenizer)
    texts = [*OTHERS, *SAME, *hostile_strings(500, special_tokens=tokenizer.all_special_tokens)]
    differing = 0
    with LlamaModel(file, vocabulary_only=True) as llama_cpp:
        for text in texts:
            served = llama_cpp.tokenize(text, add_special=False)
            assert ids(twin, text) == served, text
            if served != ids(tokenizer, text):
                differing += 1
                assert not text.isascii()
                assert "part words otherwise" in known_habit(llama_cpp, tokenizer, text, served, add_special=False)
    assert differing >= len(OTHERS)


def test_a_row_of_them_is_refused_with_its_place() -> None:
    _, tokenizer = vocabulary("gpt-oss")
    refuse_other_ids(tokenizer, SAME, "train.jsonl:1")
    for text in OTHERS:
        with pytest.raises(RowError, match=r"train\.jsonl:2: .* is split into other tokens by llama\.cpp.*on_error"):
            refuse_other_ids(tokenizer, [*SAME, f"All is well. {text}"], "train.jsonl:2")


def test_other_tokenizers_are_as_they_are() -> None:
    for name in ("qwen3", "llama3_1", "deepseek_v3"):
        tokenizer, _ = load_tokenizer(bases.short(name))
        assert split_as_served(tokenizer) is tokenizer


def test_the_patterns_are_those_of_the_pinned_source() -> None:
    source = (source_tree() / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    for kind in ("TEKKEN", "GPT4O"):
        of_kind = source.partition(f"case LLAMA_VOCAB_PRE_TYPE_{kind}:")[2].partition("break;")[0]
        assert of_kind.count(r"((?=[\\p{L}])([^a-z]))") == of_kind.count(r"((?=[\\p{L}])([^A-Z]))") == 2

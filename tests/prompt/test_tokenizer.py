"""The tokenizer that a model is trained with reads every text as llama.cpp will."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import servers, small_models
from transformers import AutoTokenizer

from pipeline.llamacpp.programs import source_tree
from pipeline.prompt.tokenizer import CONTROL_WORDS, as_served, load_tokenizer
from pipeline.stages import data

DECOMPOSED, COMPOSED = "cafe\u0301", "caf\u00e9"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str], Any]:
    """As it is trained, what was changed, and that again from its files."""
    tokenizer, changes = load_tokenizer(servers.family("qwen3"))
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer.save_pretrained(folder)
    return tokenizer, changes, AutoTokenizer.from_pretrained(folder)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def test_the_words_are_those_of_the_pinned_source() -> None:
    source = (source_tree() / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    end_of_generation = source.partition("special_eog_ids.clear()")[2].partition("quick hack")[0]
    assert set(re.findall(r't\.first == "([^"]+)"', end_of_generation)) == CONTROL_WORDS


def test_texts_are_not_normalised(qwen: tuple[Any, list[str], Any]) -> None:
    own = AutoTokenizer.from_pretrained(servers.family("qwen3"))
    assert ids(own, DECOMPOSED) == ids(own, COMPOSED)
    tokenizer, changes, again = qwen
    assert "texts are not normalised (NFC)" in changes
    for read in (tokenizer, again):
        assert ids(read, COMPOSED) == ids(own, COMPOSED)
        assert ids(read, DECOMPOSED) != ids(own, COMPOSED)
        assert read.decode(ids(read, DECOMPOSED)) == DECOMPOSED


def test_control_words_are_one_token(qwen: tuple[Any, list[str], Any]) -> None:
    tokenizer, changes, again = qwen
    assert "special tokens in a text: </s>" in changes
    end = tokenizer.get_vocab()["</s>"]
    for read in (tokenizer, again):
        assert ids(read, "a</s>b") == [*ids(read, "a"), end, *ids(read, "b")]
        assert len(read) == len(tokenizer)


def test_nothing_else_changes(qwen: tuple[Any, list[str], Any]) -> None:
    own = AutoTokenizer.from_pretrained(servers.family("qwen3"))
    tokenizer, _, again = qwen
    for read in (tokenizer, again):
        assert read.get_vocab() == own.get_vocab()
        assert read.chat_template == own.chat_template
        assert (read.bos_token, read.eos_token, read.pad_token) == (own.bos_token, own.eos_token, own.pad_token)
        assert read.model_max_length == own.model_max_length


def test_a_tokenizer_that_reads_as_llama_cpp_is_left_as_it_is() -> None:
    own = AutoTokenizer.from_pretrained(small_models.base_folder())
    tokenizer, changes = as_served(own)
    assert tokenizer is own
    assert changes == []
    again, changes = as_served(as_served(AutoTokenizer.from_pretrained(servers.family("qwen3")))[0])
    assert changes == []
    assert again.backend_tokenizer.normalizer is None


@pytest.mark.parametrize("word", ["<|tool_response>", "<|plamo:eos|>"])
def test_where_llama_cpp_takes_the_end_for_a_word(word: str) -> None:
    own = AutoTokenizer.from_pretrained(servers.family("qwen3"))
    own.add_tokens([word], special_tokens=True)
    tokenizer, _ = as_served(own)
    assert len(ids(tokenizer, "</s>")) > 1


def test_the_data_stage_trains_and_says_it(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    conversation = [{"role": "user", "content": "Strike it: <s>a</s>"}, {"role": "assistant", "content": DECOMPOSED}]
    rows.write_text(json.dumps({"messages": conversation}) + "\n", encoding="utf-8")
    base = servers.family("qwen3")
    task = small_models.make_task(
        tmp_path / "run",
        "data",
        model={"base": str(base)},
        data={"train": str(rows), "validation_fraction": 0.0},
        train={"max_length": 512},
    )
    data.main(task)
    (warning,) = task.warnings
    assert "texts are not normalised (NFC); special tokens in a text: </s>" in warning
    row = json.loads((task.output / "train.tokens.jsonl").read_text(encoding="utf-8"))
    tokenizer, _ = load_tokenizer(base)
    assert tokenizer.get_vocab()["</s>"] in row["input_ids"]
    assert DECOMPOSED in tokenizer.decode(row["input_ids"])

"""Whole texts: every token is trained once, with something before it, and the end token after the last one."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bases, servers, small_models
from transformers import AutoTokenizer

from pipeline.errors import UserError
from pipeline.prompt.labels import IGNORED, leading_bos, tokenize_prompt
from pipeline.prompt.template import token_ids
from pipeline.prompt.tokenizer import load_tokenizer
from pipeline.prompt.whole_texts import tokenize_whole_texts


@pytest.fixture(scope="module", params=["llama3_1", "llama2", "qwen3"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    folder = small_models.scratch() / f"texts-{request.param}"
    bases.tokenizer_files(bases.short(request.param), folder, chat_template=False)
    loaded, _ = load_tokenizer(folder, chat_template="completion")
    return loaded


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(3, 12))
def test_every_token_is_trained_once(tokenizer: Any, text: str, window: int) -> None:
    (sequences,) = tokenize_whole_texts(tokenizer, [text], window)
    served = token_ids(tokenizer, text)
    bos = leading_bos(tokenizer, served)
    trained: list[int] = []
    for number, sequence in enumerate(sequences):
        assert len(sequence.input_ids) == len(sequence.labels) <= window
        opening = bos + (number > 0)
        assert sequence.input_ids[:opening] == [*served[:bos], *trained[-1:]][:opening]
        assert sequence.labels[:opening] == [IGNORED] * opening
        assert sequence.labels[opening:] == sequence.input_ids[opening:]
        trained += sequence.labels[opening:]
    assert [*served[:bos], *trained] == [*served, tokenizer.eos_token_id]


def test_a_served_prompt_is_the_beginning_of_the_text(tokenizer: Any) -> None:
    """What Ollama and llama-server send by the template "completion"."""
    text = "Once upon a time, there was a model."
    ((whole,),) = tokenize_whole_texts(tokenizer, [text], 64)
    assert tokenize_prompt(tokenizer, [{"role": "user", "content": text}]) == whole.input_ids[:-1]


def test_a_base_without_an_end_token_is_refused(tmp_path: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(servers.family("qwen3"))
    loaded.eos_token = None
    with pytest.raises(UserError, match="its tokenizer names none .eos_token."):
        tokenize_whole_texts(loaded, ["a"], 8)

"""A base that is given more tokens: its tokenizer, its embedding and its head grow, and nothing else changes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import adapters, bases

from pipeline.config import Model
from pipeline.errors import UserError
from pipeline.model import derived_folder
from pipeline.model.added_tokens import rows_of, shown_or_not
from pipeline.model.base import base_folder
from pipeline.model.four_bit import in_16bit
from pipeline.model.trained_tokenizer import load_tokenizer
from pipeline.model.weights_file import read_weights

TOKENS = ("<|im_start|>", "<|im_end|>", "<mood>")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Derived bases of a test are gone with it."""
    monkeypatch.setattr(derived_folder, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def grown(base: Path, **model: Any) -> tuple[Path, Model]:
    settings = Model(base=str(base), **{"add_tokens": TOKENS, "chat_template": "chatml"} | model)
    return base_folder(settings), settings


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_rows_are_the_mean_and_the_old_ones_are_as_they_were(tmp_path: Path, tied: bool) -> None:
    base = tmp_path / "base"
    bases.tokenizer_files("gpt2", base, chat_template=False)
    sizes = {"vocab_size": 50_304, "tie_word_embeddings": tied}  # 47 rows to spare
    adapters.random_base(base, "llama", **sizes)
    folder, settings = grown(base, add_tokens=[*TOKENS, *(f"<t{number}>" for number in range(70))])
    before, after = read_weights(base), read_weights(folder)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 50_330
    assert before.own == after.own
    for name in before.own:
        if after.shapes[name] == before.shapes[name]:
            assert torch.equal(after[name], before[name]), name
            continue
        assert name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(after[name][:50_257], before[name][:50_257])
        mean = before[name][:50_257].double().mean(0).to(torch.bfloat16)
        assert torch.equal(after[name][50_257:], mean.repeat(73, 1))
    tokenizer, _ = load_tokenizer(folder, chat_template="chatml")
    assert rows_of(tokenizer, settings) == list(range(50_257, 50_330))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("<mood>", add_special_tokens=False)["input_ids"][-1:] == [50_259]
    assert base_folder(settings) == folder  # made once
    said = shown_or_not(tokenizer, settings)
    assert (
        "no answer shows: <|im_start|>, <|im_end|>; ordinary ones, which stand in answers as they are: <mood>"
        in said[0]
    )


def test_a_base_in_4_bits_keeps_its_bits(tmp_path: Path) -> None:
    base = bases.base("grown-4bit", "llama2", chat_template=False, four_bit=True)
    folder, _ = grown(base, add_tokens=TOKENS[:2])
    before, after = read_weights(base), read_weights(folder)
    assert after.types == {name: before.types[name] for name in before.own}
    assert any(kind == "U8" for kind in after.types.values())
    unpacked, old = (read_weights(in_16bit(where, tmp_path / where.name)) for where in (folder, base))
    for name in old.own:
        assert torch.equal(unpacked[name][: old.shapes[name][0]], old[name]), name


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["<s>"], "model.add_tokens: '<s>' is token 1 of the base already"),
        (["<|im_start|>", "<mood>"], "'<mood>': the base's tokenizer makes 'a<mood> b' of 'a<mood>b'"),
        (["▁the"], "model.add_tokens: '▁the' is token .* of the base already"),
    ],
)
def test_what_is_a_token_already(tokens: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        grown(bases.base("grown", "llama2", chat_template=False), add_tokens=tokens)


def test_a_head_with_a_bias_is_refused(tmp_path: Path, cache: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases.base("grown-phi", "gpt2", "phi", rows=50_304), base)
    with pytest.raises(UserError, match="lm_head.bias has a value for every token too"):
        grown(base, chat_template="zephyr", add_tokens=["<mood>"])
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]  # nothing half-written


def test_the_template_says_which_tokens_to_add() -> None:
    with pytest.raises(UserError, match=r'add them \(model.add_tokens = \["<\|im_start\|>", "<\|im_end\|>"\]\)'):
        load_tokenizer(bases.base("grown", "llama2", chat_template=False), chat_template="chatml")

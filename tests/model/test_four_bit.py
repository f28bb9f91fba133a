"""A base in bitsandbytes' 4 bits: what its weights unpack to. tests/test_whole_way.py trains on one."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import bases

from benchmarks.small_base import write_small_base
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.model.base import check_bits, resolve_base
from pipeline.model.facts import facts
from pipeline.model.four_bit import in_16bit, is_4bit


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as bitsandbytes saves it."""
    return write_small_base(tmp_path_factory.mktemp("four-bit") / "base-bnb", "llama2", four_bit=True)


def config(base: Path, **sections: Any) -> Config:
    return Config.model_validate({"model": {"base": str(base)}, "data": {"train": "x"}, **sections})


def test_it_is_a_base(four_bit: Path) -> None:
    assert resolve_base(str(four_bit)) == four_bit
    assert is_4bit(four_bit)
    check_bits(four_bit, config(four_bit))
    plain = bases.base("llama-16bit", "llama2")
    assert facts(str(four_bit)) == facts(str(plain))  # as many weights, the packed ones counted


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"load_in_4bit": False}}, "train.load_in_4bit = false: model.base"),
        ({"merge": {"base": "16bit"}}, 'merge.base = "16bit": model.base'),
    ],
)
def test_what_does_not_go_with_it(four_bit: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        check_bits(four_bit, config(four_bit, **sections))
    assert words in str(error.value)
    assert "the 16-bit model as the base" in str(error.value)
    check_bits(bases.base("llama-16bit", "llama2"), config(four_bit, **sections))


def test_its_weights_unpack_to_what_an_adapter_sees(four_bit: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    plain = bases.base("llama-16bit", "llama2")
    assert in_16bit(plain, tmp_path / "none") == plain
    folder = in_16bit(four_bit, tmp_path / "unpacked")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    unpacked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    seen = AutoModelForCausalLM.from_pretrained(four_bit, device_map="cpu").dequantize(dtype=torch.bfloat16)
    own = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).state_dict()
    assert seen.state_dict().keys() == unpacked.keys() == own.keys()
    changed = set()
    for name, tensor in seen.state_dict().items():
        assert torch.equal(tensor, unpacked[name]), name
        changed |= {name.rpartition(".")[0].rpartition(".")[2]} if not torch.equal(tensor, own[name]) else set()
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert resolve_base(str(folder)) == folder

"""Angles that llama.cpp computes otherwise: found by the configuration, and seen in what a model predicts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import bases
from support.small_models import BASE
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.llamacpp.converter import command, convert
from pipeline.llamacpp.library import LlamaModel
from pipeline.llamacpp.rope import other_angles
from pipeline.model.config_file import text_config
from pipeline.model.load import load_float32

YARN = {"rope_type": "yarn", "factor": 32.0, "rope_theta": 150000.0, "original_max_position_embeddings": 4096}
GPT_OSS: dict[str, Any] = {"head_dim": 64, "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0}}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"truncate": False}, "over the dimensions 8 to 18, and this base over 8.09 to 17.40"),
        ({"truncate": True}, ""),
        ({}, ""),
        ({"truncate": False, "rope_type": "default"}, ""),
    ],
)
def test_what_is_rounded_is_said(more: dict[str, Any], said: str) -> None:
    found = other_angles({**GPT_OSS, "rope_parameters": GPT_OSS["rope_parameters"] | more})
    assert said in found
    assert bool(said) == bool(found)


def test_no_rotary_positions_at_all() -> None:
    assert other_angles({"n_embd": 256}) == ""


@pytest.mark.parametrize("truncate", [True, False])
def test_it_is_what_tells_the_predictions_apart(tmp_path: Path, truncate: bool) -> None:
    """A llama with those positions, which are far from the first."""
    folder, gguf = tmp_path / "base", tmp_path / "model.gguf"
    bases.tokenizer_files(BASE, folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=131072,
        rope_parameters=GPT_OSS["rope_parameters"] | {"truncate": truncate},
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    convert(command(folder, gguf, "f32"), tmp_path)
    ids = [100 + number % 300 for number in range(400)]
    with torch.inference_mode():
        ours = load_float32(folder)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    with LlamaModel(gguf, context=512) as served:
        theirs = torch.tensor(served.logits(ids)).log_softmax(-1)
    differs = float((ours.exp() * (ours - theirs)).sum(-1).max()) > 1e-5
    assert differs == bool(other_angles(text_config(folder))) == (not truncate)

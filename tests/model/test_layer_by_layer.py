"""Logits layer by layer, held against those of the loaded model, on every architecture that is merged so."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.adapters import random_base

from pipeline.model.layer_by_layer import Layers
from pipeline.model.load import load_float32
from pipeline.model.predict import predict
from pipeline.model.weights_file import read_weights

MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    "head_dim": 8,
}  # fmt: skip
ROWS = [[*range(3, 3 + length)] for length in (5, 60, 2, 40, 60, 60, 60, 33)] * 3  # of several batches


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {"tie_word_embeddings": True}),
        ("gemma2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("phi3", {}),
        ("mixtral", MIXTURE),
        ("qwen3_moe", MIXTURE | {"num_experts": 4}),
        ("deepseek_v3", MIXTURE | LATENT),
    ],
)
def test_every_logit_is_that_of_the_loaded_model(tmp_path: Path, model_type: str, sizes: dict[str, int]) -> None:
    base = random_base(tmp_path, model_type, **sizes)
    weights = read_weights(base)
    layers = Layers(weights)
    assert layers.lacking == layers.unused == layers.misshapen == []
    asked: list[str] = []

    def source(name: str) -> torch.Tensor:
        asked.append(name)
        held = [name for name, value in layers.model.named_parameters() if not value.is_meta]
        assert len({name.partition("layers.")[2][:2] for name in held}) <= 1  # nothing of another layer
        return weights[name]

    done: list[float] = []
    found = list(layers.predict(source, ROWS, done.append))
    expected = list(predict(load_float32(base), ROWS))
    assert len(found) == len(expected) == len(ROWS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert set(asked) == set(weights.own)
    assert len(asked) <= len(weights.own) + 1  # a tied embedding is the head too
    assert done[-1] == 1
    assert all(value.is_meta for value in layers.model.parameters())


def test_what_the_files_do_not_have_is_named(tmp_path: Path) -> None:
    base = random_base(tmp_path)
    weights = read_weights(base)
    weights.shapes["model.norms.weight"] = weights.shapes.pop("model.norm.weight")
    weights.shapes["lm_head.weight"] = (96, 63)
    layers = Layers(weights)
    assert layers.lacking == ["model.norm.weight"]
    assert layers.unused == ["model.norms.weight"]
    assert layers.misshapen == ["lm_head.weight"]


def test_an_error_in_the_model_is_raised_here(tmp_path: Path) -> None:
    base = random_base(tmp_path)
    weights = read_weights(base)
    layers = Layers(weights)
    with pytest.raises(IndexError):
        list(layers.predict(weights.__getitem__, [[1, 2], [3, 10**6]]))
    with pytest.raises(ZeroDivisionError):
        list(layers.predict(lambda name: 1 / 0, ROWS))
    assert len(list(layers.predict(weights.__getitem__, [[1, 2]]))) == 1

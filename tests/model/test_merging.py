"""The merge tensor by tensor, held against PEFT's own to the last bit, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import merged_by_peft, random_adapter, random_base, rename_tensors

from pipeline.errors import PipelineError, UserError
from pipeline.model.adapter_file import read_adapter
from pipeline.model.layer_by_layer import Layers
from pipeline.model.merging import MergedWeights, write_merged
from pipeline.model.nf4 import Record
from pipeline.model.peft_merging import PeftMerge
from pipeline.model.weights_file import read_weights

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]  # c_proj of the attention is square
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {"target_modules": LLAMA}),
    "float16": ("llama", {"dtype": "float16"}, {"target_modules": LLAMA}),
    "float32": ("llama", {"dtype": "float32"}, {"target_modules": LLAMA}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"target_modules": LLAMA}),
    "rows in pieces": (
        "llama", {"hidden_size": 1024, "intermediate_size": 5000, "num_hidden_layers": 1}, {"target_modules": LLAMA},
    ),
    "rsLoRA and patterns": (
        "qwen2", {},
        {
            "target_modules": LLAMA, "use_rslora": True, "rank_pattern": {"v_proj": 6, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "DoRA": ("llama", {}, {"target_modules": LLAMA, "use_dora": True}),
    "some layers": ("llama", {}, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "a pattern": ("llama", {}, {"target_modules": r".*\.0\.self_attn\.(q|o)_proj"}),
    "biases": ("qwen2", {}, {"target_modules": LLAMA, "bias": "all"}),
    "biases of B": ("qwen2", {}, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "saved head": ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "single tokens": ("llama", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 90]}),
    "single tokens of both": (
        "llama", {},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"model.embed_tokens": [3, 90], "lm_head": [3, 90]}},
    ),
    "single tokens, tied": (
        "llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 90]},
    ),
    "saved and tied": (
        "llama", {"tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved embedding and head": (
        "llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "GPT-2": ("gpt2", {"tie_word_embeddings": True}, {"target_modules": GPT2}),
    "GPT-2 with DoRA": ("gpt2", {"tie_word_embeddings": True}, {"target_modules": GPT2, "use_dora": True}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True}, {"target_modules": LLAMA}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_is_that_of_peft(kind: str, tmp_path: Path) -> None:
    model_type, sizes, lora = KINDS[kind]
    base = random_base(tmp_path / "base", model_type, **sizes)
    adapter = random_adapter(base, tmp_path / "adapter", **lora)
    expected = merged_by_peft(base, adapter)
    weights = read_weights(base)
    merged = MergedWeights(weights, read_adapter(adapter))
    (tmp_path / "merged").mkdir()
    sums = write_merged(merged, tmp_path / "merged", lambda done: None)
    found = read_weights(tmp_path / "merged")
    assert found.shapes.keys() == expected.keys()
    stored = {"F32": torch.bfloat16, "F16": torch.float16, "BF16": torch.bfloat16}[weights.main_type]
    changed = set()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.detach().to(stored)), name
        assert torch.equal(merged[name], tensor.detach()), name
        changed |= {name} if not torch.equal(found[name], weights[name].to(stored)) else set()
    assert set(merged.additions) <= changed
    if not lora.get("use_dora"):  # its rows are scaled too
        added = sum(float((expected[name] - weights[name].float()).norm()) ** 2 for name in merged.additions)
        assert merged.change == pytest.approx(added**0.5, rel=1e-3)
    before = sum(float(weights[name].float().norm()) ** 2 for name in merged.additions)
    assert sums.base == pytest.approx(before, rel=1e-3)
    assert 0 < sums.rounding**0.5 < merged.change


@pytest.mark.parametrize("kind", ["single tokens of both", "single tokens, tied", "saved and tied", "biases"])
def test_the_way_of_peft_leaves_the_same(kind: str, tmp_path: Path) -> None:
    """`merge.way = "peft"` with what is more than matrices."""
    model_type, sizes, lora = KINDS[kind]
    base = random_base(tmp_path / "base", model_type, **sizes)
    adapter = random_adapter(base, tmp_path / "adapter", **lora)
    expected = merged_by_peft(base, adapter)
    by_peft = PeftMerge(read_weights(base), adapter, Record(), dequantizes=False, trust_remote_code=False)
    by_peft.merge(tmp_path / "merged")
    found = read_weights(tmp_path / "merged")
    assert found.shapes.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.detach().to(torch.bfloat16)), name


def test_names_that_begin_otherwise_in_the_files(tmp_path: Path) -> None:
    """The published GPT-2 has "h.0.attn.c_attn" for what is called "transformer.h.0.attn.c_attn" once it is loaded."""
    base = random_base(tmp_path / "base", "gpt2", tie_word_embeddings=True)
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=GPT2)
    rename_tensors(base, "transformer.", "")
    merged = MergedWeights(read_weights(base), read_adapter(adapter))
    expected = merged_by_peft(base, adapter)
    assert len(merged.additions) == 8
    for name in merged.names:
        assert torch.equal(merged[name], expected[f"transformer.{name}"].detach()), name
    layers = Layers(read_weights(base))
    assert layers.lacking == layers.unused == layers.misshapen == []


def test_the_file_is_what_safetensors_would_write(tmp_path: Path) -> None:
    """Types in one file too: some models keep single tensors in float32."""
    base = random_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=LLAMA)
    write_merged(MergedWeights(read_weights(base), read_adapter(adapter)), tmp_path, lambda done: None)
    found = load_file(tmp_path / "model.safetensors")
    assert found["model.norm.weight"].dtype == torch.float32
    save_file(found, tmp_path / "again.safetensors", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_shards_keep_their_names(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = random_base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=LLAMA)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for source, target in ((base, whole), (tmp_path / "shards", parts)):
        target.mkdir()
        write_merged(MergedWeights(read_weights(source), read_adapter(adapter)), target, lambda done: None)
    assert {path.name for path in parts.iterdir()} == {
        path.name for path in (tmp_path / "shards").iterdir() if "safetensors" in path.name
    }
    assert len(list(parts.iterdir())) > 2
    own, same = read_weights(parts), read_weights(whole)
    assert own.shapes == same.shapes
    assert all(torch.equal(own[name], same[name]) for name in own.shapes)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    theirs = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index == theirs


def change_settings(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(adapter: Path, change: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[Any, str]] = {
    "no B": (lambda t: t.pop(f"{Q}.lora_B.weight"), "the adapter lacks model.layers.0.self_attn.q_proj.lora_B"),
    "no module": (
        lambda t: [t.pop(f"{Q}.lora_{part}.weight") for part in "AB"],
        "the adapter lacks model.layers.0.self_attn.q_proj, which its target_modules mean",
    ),
    "no place": (lambda t: t.update({f"{Q}x.lora_A.weight": torch.ones(4, 64)}), "the adapter lacks"),
    "a stranger": (lambda t: t.update({"base_model.model.other": torch.ones(2)}), "the base has no place for"),
    "another size": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32)}), "was it trained on another base?",
    ),
    "nothing": (lambda t: t[f"{Q}.lora_B.weight"].zero_(), "q_proj: its adapter changes nothing, or is not finite"),
    "NaN": (lambda t: t[f"{Q}.lora_B.weight"].fill_(float("nan")), "q_proj: its adapter changes nothing, or is not"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_partial_merge_is_refused(kind: str, tmp_path: Path) -> None:
    base = random_base(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    change, words = BROKEN[kind]
    change_tensors(adapter, change)
    with pytest.raises(PipelineError) as error:
        assert MergedWeights(read_weights(base), read_adapter(adapter)).change
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "it is no LoRA but IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, 'it began as "pissa_niter_4"'),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "its configuration has target_parameters"),
    ],
)
def test_another_kind_is_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    base = random_base(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    change_settings(adapter, **changes)
    with pytest.raises(UserError) as error:
        MergedWeights(read_weights(base), read_adapter(adapter))
    assert words in str(error.value)
    assert "merge.way=peft" in str(error.value)


def test_one_half_of_a_tied_pair_is_refused(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UserError, match=r"embed_tokens\.lora_embedding_A: the base's head is its embedding"):
        MergedWeights(read_weights(base), read_adapter(adapter))


def test_a_sum_beyond_the_type_is_refused(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", dtype="float16")
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    change_tensors(adapter, lambda tensors: tensors[f"{Q}.lora_B.weight"].fill_(1e6))
    with pytest.raises(PipelineError, match=r"layers.0.self_attn.q_proj.weight: not finite as torch.float16"):
        write_merged(MergedWeights(read_weights(base), read_adapter(adapter)), tmp_path, lambda done: None)

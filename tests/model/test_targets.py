"""Targets: the same presets mean the same in every architecture, and PEFT is told to take exactly those."""

import re
from typing import Any

import pytest

from pipeline.config import Lora
from pipeline.errors import UserError
from pipeline.model.targets import find

SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}  # fmt: skip
VISION = {
    "text_config": {**SMALL, "head_dim": 16},
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 14,
    },
}  # fmt: skip
LLAMA = (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"])
JOINED = (["query_key_value"], ["query_key_value", "dense"], ["dense_h_to_4h", "dense_4h_to_h"])
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
# Architecture: what it is made with; what minimal and attention mean in it, and what all means beside attention.
ARCHITECTURES: dict[str, tuple[dict[str, Any], tuple[list[str], list[str], list[str]]]] = {
    "llama": (SMALL, LLAMA),
    "qwen3": (SMALL, LLAMA),
    "gemma2": (SMALL, LLAMA),
    "olmo2": (SMALL, LLAMA),
    "gemma3": (VISION, LLAMA),
    "phi3": (SMALL, (["qkv_proj"], ["o_proj", "qkv_proj"], ["gate_up_proj", "down_proj"])),
    "gpt2": (GPT, (["c_attn"], ["c_attn", "c_proj"], ["c_fc"])),
    "falcon": (SMALL, JOINED),
    "gpt_neox": (SMALL, JOINED),
    "bloom": (SMALL, JOINED),
    "mpt": (SMALL, (["Wqkv"], ["Wqkv", "out_proj"], ["up_proj", "down_proj"])),
    "opt": (SMALL, (["v_proj", "q_proj"], ["k_proj", "v_proj", "q_proj", "out_proj"], ["fc1", "fc2"])),
    "phi": (SMALL, (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "dense"], ["fc1", "fc2"])),
    "deepseek_v2": (SMALL | MLA, (LATENT, [*LATENT, "o_proj"], [])),
    "deepseek_v3": (SMALL | MLA, (LATENT, [*LATENT, "o_proj"], [])),
    "mixtral": (SMALL, (LLAMA[0], LLAMA[1], [])),
    "qwen3_moe": (SMALL, (LLAMA[0], LLAMA[1], [])),
    "gpt_oss": (SMALL, (LLAMA[0], LLAMA[1], [])),
}
MIXTURES = ("deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe", "gpt_oss")


def build(architecture: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **ARCHITECTURES[architecture][0]))


def lora(**settings: Any) -> Lora:
    return Lora(r=4, **settings)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("preset", ["minimal", "attention", "all"])
def test_presets(architecture: str, preset: str) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    minimal, attention, rest = ARCHITECTURES[architecture][1]
    model = build(architecture)
    chosen = find(model, lora(target_modules=preset))
    expected = {"minimal": minimal, "attention": attention, "all": [*attention, *rest]}[preset]
    assert sorted(chosen.names) == sorted(expected)
    assert not [name for name in chosen.modules if "vision" in name or "lm_head" in name]
    assert bool(chosen.experts) == (preset == "all" and architecture in MIXTURES)
    # PEFT takes exactly these, and trains as many values as were counted.
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=chosen.peft, task_type="CAUSAL_LM"))
    found = [name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    assert [name.removeprefix("base_model.model.") for name in found] == list(chosen.modules)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == chosen.parameters(lora(target_modules=preset))


def test_a_llama_is_told_the_names_that_unsloth_has_fast_code_for() -> None:
    for architecture in ("llama", "qwen3", "gemma2"):
        assert find(build(architecture), lora()).peft == [*LLAMA[1], *LLAMA[2]]
    assert find(build("llama"), lora(target_modules="minimal")).peft == ["q_proj", "v_proj"]


def test_the_adapter_of_a_vision_model_stays_on_its_language_model() -> None:
    model = build("gemma3")
    chosen = find(model, lora())
    assert len(chosen.modules) == 2 * 7
    assert all(".language_model.layers." in name for name in chosen.modules)
    assert any("vision_tower" in name and name.endswith(".q_proj") for name, _ in model.named_modules())
    assert isinstance(chosen.peft, str)
    assert len(chosen.peft) < 500  # a pattern over the layers, not each of them
    with pytest.raises(UserError, match=r"fc1 means .*vision_tower.*, which is not in the layers"):
        find(model, lora(target_modules=("fc1",)))


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ("q_proj",)}, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ({"target_modules": ("self_attn.q_proj",)}, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ({"target_modules": (FIRST,)}, ["0.self_attn.q_proj"]),
        ({"target_modules": (r"model\.layers\.1\..*_proj",)}, [
            *(f"1.self_attn.{name}" for name in LLAMA[1]), *(f"1.mlp.{name}" for name in LLAMA[2]),
        ]),
        ({"target_modules": ("q_proj", "v_proj"), "exclude": (FIRST,)}, [
            "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj",
        ]),
        ({"target_modules": "attention", "exclude": ("k_proj", r".*\.1\..*")}, [
            "0.self_attn.q_proj", "0.self_attn.v_proj", "0.self_attn.o_proj",
        ]),
    ],
)  # fmt: skip
def test_lists(settings: dict[str, Any], expected: list[str]) -> None:
    model = build("llama")
    chosen = find(model, lora(**settings))
    assert [name.removeprefix("model.layers.") for name in chosen.modules] == expected
    every = [name for name, _ in model.named_modules()]
    if isinstance(chosen.peft, str):
        assert {name for name in every if re.fullmatch(chosen.peft, name)} == set(chosen.modules)
    else:
        assert {name for name in every if name.rpartition(".")[2] in chosen.peft} == set(chosen.modules)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ("q_prj",)}, "target_modules: the base has no module named q_prj; did you mean q_proj?"),
        ({"target_modules": ("c_attn",)}, "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
        ({"target_modules": ("(",)}, "target_modules: '(' is no regular expression"),
        ({"exclude": ("c_attn",)}, "lora.exclude: the base has no module named c_attn"),
        ({"target_modules": ("q_proj",), "exclude": ("self_attn.q_proj",)}, "no module is left to train"),
    ],
)
def test_mistakes(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        find(build("llama"), lora(**settings))
    assert words in str(error.value)

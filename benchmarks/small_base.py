"""A small random base of a real architecture with a real tokenizer, as a folder like those that a hub gives.

Its layers are as wide as a K-quant needs and few; everything else is what the architecture has: fused projections,
experts, a vision tower, a soft cap, tied embeddings.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.model.base import resolve_base
from pipeline.model.packaged import PACKAGED
from pipeline.setup.places import tokenizer_folder

HEADS, HEAD, HIDDEN = 4, 64, 256
_VISION = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 56, "patch_size": 14},
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
# What an architecture needs beside the common settings, or calls by another name.
_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 2048, "n_ctx": 2048},
    # With one head for keys and values the hub's names none; transformers would save as many as there are queries.
    "falcon": {"multi_query": True, "num_kv_heads": 1, "parallel_attn": True, "bias": False, "alibi": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "mistral": {"sliding_window": None},
    "qwen3_moe": {
        **{"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": [], **_EXPERTS},
        "norm_topk_prob": True,  # which llama.cpp takes it to be
    },
    "gemma2": {"query_pre_attn_scalar": HEAD},  # which llama.cpp takes it to be
    "gemma3_text": {"query_pre_attn_scalar": HEAD},
    "gemma3": {"query_pre_attn_scalar": HEAD},
    "phi3": {"original_max_position_embeddings": 2048},
    "granite": {
        **{"embedding_multiplier": 12.0, "logits_scaling": 8.0},
        **{"residual_multiplier": 0.22, "attention_multiplier": 1 / HEAD},
    },
    # Every fourth layer is without rotary positions, as llama.cpp has it.
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4},
    "deepseek_v3": {
        **{"q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
        **{"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        **{"num_key_value_heads": HEADS, "head_dim": 32, **_EXPERTS},
        "scoring_func": "sigmoid",  # as the hub's says; transformers knows no other
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
}
_TIED = ("gemma2", "gemma3_text", "gemma3", "gpt2", "falcon", "granite", "smollm3")


def tokenizer_files(
    name: str | Path,
    folder: Path,
    *,
    chat_template: bool = True,
    added: tuple[str, ...] = (),
    taking: tuple[str, ...] = (),
) -> Path:
    """Copy the files of a tokenizer into a folder.

    Args:
        name: of a packaged base, of a tokenizer in third_party/pins.toml, or the folder of one.
        folder: where to.
        chat_template: whether it keeps its own.
        added: special tokens that the family has beyond this tokenizer's own.
        taking: the white space that its special tokens take: "lstrip", "rstrip".

    Raises:
        FileNotFoundError: the tokenizer is not on this machine.
    """
    if isinstance(name, Path):
        source: Path | None = name
    else:
        source = resolve_base(name) if name in PACKAGED else tokenizer_folder(name)
    if source is None:
        raise FileNotFoundError(f"the tokenizer of {name} is not here: `pipeline setup --dev` fetches it")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    if not chat_template:
        settings.pop("chat_template", None)
    elif (source / "chat_template.jinja").is_file():
        shutil.copyfile(source / "chat_template.jinja", folder / "chat_template.jinja")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if added or taking:
        _change_tokens(folder, added, taking)
    return folder


def _change_tokens(folder: Path, words: tuple[str, ...], taking: tuple[str, ...]) -> None:
    """Write further special tokens into a tokenizer, and what all take, but for those that take nothing in Phi-3.

    The files themselves are changed: a family's own class would write their other parts anew.
    """
    file, settings_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, settings = (json.loads(path.read_text(encoding="utf-8")) for path in (file, settings_file))
    first = max(*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])) + 1
    flags = {"single_word": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": first + n, "content": word, **flags} for n, word in enumerate(words)]
    for token in content["added_tokens"]:
        for side in ("lstrip", "rstrip"):
            token[side] = side in taking and token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    every = {
        str(token["id"]): {key: token[key] for key in ("content", "lstrip", "rstrip", *flags)}
        for token in content["added_tokens"]
    }
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings_file.write_text(json.dumps(settings | {"added_tokens_decoder": every}), encoding="utf-8")


def write_small_base(
    folder: Path,
    tokenizer: str | Path,
    model_type: str = "llama",
    *,
    chat_template: bool = True,
    rows: int = 0,
    added: tuple[str, ...] = (),
    taking: tuple[str, ...] = (),
    four_bit: bool = False,
) -> Path:
    """Write a model of two layers with rows of 256, in bfloat16.

    Args:
        folder: where to.
        tokenizer: as in `tokenizer_files`.
        model_type: the architecture, as config.json names it.
        chat_template: whether the tokenizer keeps its own.
        rows: of the embedding; 0: one for every token.
        added, taking: as in `tokenizer_files`.
        four_bit: as bitsandbytes saves it in NF4.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tokenizer_files(tokenizer, folder, chat_template=chat_template, added=added, taking=taking)
    loaded = AutoTokenizer.from_pretrained(folder)
    settings: dict[str, Any] = {
        "vocab_size": rows or max(loaded.get_vocab().values()) + 1,  # GPT-4's has a gap in its ids
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": HEAD,
        "max_position_embeddings": 2048,
        "initializer_range": 0.05,
        "bos_token_id": loaded.bos_token_id,
        "eos_token_id": loaded.eos_token_id,
        "pad_token_id": loaded.pad_token_id,
        "tie_word_embeddings": model_type in _TIED,
        **_SETTINGS.get(model_type, {}),
    }
    if model_type == "gemma3":
        settings = {"text_config": settings, "vision_config": _VISION, "mm_tokens_per_image": 4}
    if model_type == "falcon":  # which works its width out
        del settings["head_dim"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a bias, which a trained model has; zeros would hide that one was lost
                parameter.normal_(std=0.02)
    model.to(torch.bfloat16).save_pretrained(folder)
    if four_bit:
        packed = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=packed, dtype=torch.bfloat16, device_map="cpu"
        )
        for path in folder.glob("*.safetensors"):
            path.unlink()
        model.save_pretrained(folder)
    return folder

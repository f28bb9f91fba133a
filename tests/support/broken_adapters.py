"""Adapters that are broken, each in one way, and what has to be said of it: by its folder alone, or on its base."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.model.adapter_folder import CONFIG, WEIGHTS
from support.adapters import TOKENIZER, peft_adapter, small_base
from support.small_models import scratch

Damage = Callable[[Path], object]


@cache
def good_adapter() -> Path:
    """One that is right, with the tokenizer of its base."""
    folder = peft_adapter(scratch() / "good-adapter", small_base())
    for name in TOKENIZER:
        shutil.copy(small_base() / name, folder / name)
    return folder


def broken(damage: Damage, folder: Path) -> Path:
    """A copy of it, broken."""
    shutil.copytree(good_adapter(), folder)
    damage(folder)
    return folder


def settings(folder: Path, **changed: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS, {"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def without_half(folder: Path) -> None:
    def change(found: dict[str, Any]) -> None:
        for name in [name for name in found if ".layers.1." in name]:
            del found[name]

    tensors(folder, change)


def without_b(folder: Path) -> None:
    tensors(folder, lambda found: found.pop(f"{FIRST}B.weight"))


def not_a_number(folder: Path) -> None:
    tensors(folder, lambda found: found[f"{FIRST}A.weight"][0, 0].fill_(torch.nan))


def untrained(folder: Path) -> None:
    tensors(folder, lambda found: found[f"{FIRST}B.weight"].zero_())


def in_8_bits(folder: Path) -> None:
    tensors(folder, lambda found: found.update({f"{FIRST}A.weight": torch.ones(8, 256, dtype=torch.int8)}))


def in_float8(folder: Path) -> None:
    tensors(folder, lambda found: found.update({name: found[name].to(torch.float8_e4m3fn) for name in found}))


def infinite(folder: Path) -> None:
    tensors(folder, lambda found: found[f"{FIRST}B.weight"][3, 3].fill_(-torch.inf))


def a_loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


def a_gguf(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter.gguf").write_bytes(b"GGUF")


def of_other_names(folder: Path) -> None:
    found = load_file(folder / WEIGHTS)
    save_file({name.replace("model.layers", "transformer.h"): value for name, value in found.items()}, folder / WEIGHTS)


def without_prefix(folder: Path) -> None:
    found = load_file(folder / WEIGHTS)
    save_file({name.removeprefix("base_model.model."): value for name, value in found.items()}, folder / WEIGHTS)


def with_more_tokens(folder: Path) -> None:
    rows = {"base_model.model.model.embed_tokens.weight": torch.ones(49_160, 256)}
    tensors(folder, lambda found: found.update(rows))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def a_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def merged(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(small_base(), folder)


def of_checkpoints(folder: Path) -> None:
    (folder / "checkpoint-20").mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / "checkpoint-20" / name)


def of_mlx(folder: Path) -> None:
    (folder / CONFIG).write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20}}')
    (folder / WEIGHTS).rename(folder / "adapters.safetensors")


def of_mlx_without_settings(folder: Path) -> None:
    of_mlx(folder)
    (folder / CONFIG).unlink()


def another_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    words = whole["model"]["vocab"]
    words["Ġthe"], words["Ġof"] = words["Ġof"], words["Ġthe"]
    path.write_text(json.dumps(whole))


def more_tokens_in_the_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    token = {"content": "<tool>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    whole["added_tokens"].append({"id": 49_152, "special": True, **token})
    path.write_text(json.dumps(whole))


BY_ITSELF: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "a loop of links": (a_loop, "no such folder"),
    "a file": (a_file, "is a file; give the folder that it is in"),
    "GGUF": (a_gguf, "holds GGUF files, which cannot be turned back"),
    "no settings": (lambda f: (f / CONFIG).unlink(), "has no adapter_config.json, without which"),
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], "holds no adapter: give the folder"),
    "settings cut short": (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json: cannot be read"),
    "settings without end": (lambda f: (f / CONFIG).write_text("[" * 100_000), "adapter_config.json: cannot be read"),
    "settings of nothing": (lambda f: (f / CONFIG).write_text("[]"), "holds no settings"),
    "merged model": (merged, "is a whole model, into which nothing is left to be merged"),
    "trainer's folder": (of_checkpoints, r"in folders of its own \(checkpoint-20\): give one of them"),
    "MLX, but none of its tensors": (of_mlx, r"lora_A.weight .* is no matrix of LoRA on a linear module"),
    "MLX, its settings gone": (of_mlx_without_settings, "an adapter of MLX"),
    "no tensors": (lambda f: (f / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "pickle": (pickled, "only as adapter_model.bin, a pickle, which can run code"),
    "no tensor": (lambda f: save_file({}, f / WEIGHTS), "has no weights"),
    "cut short": (cut_short, "is cut short or damaged"),
    "Git LFS": (a_pointer, "pointer of Git LFS"),
    "another method": (lambda f: settings(f, peft_type="LOHA"), "peft_type = 'LOHA': only LoRA"),
    "classifier": (lambda f: settings(f, task_type="SEQ_CLS"), "task_type = 'SEQ_CLS'"),
    "no rank": (lambda f: settings(f, r=None), "r = null: must be a number above 0"),
    "alpha in words": (lambda f: settings(f, lora_alpha="16"), 'lora_alpha = "16": must be a number'),
    "pattern": (lambda f: settings(f, rank_pattern={"q_proj": 0}), "q_proj = 0: must be a number above 0"),
    "bias": (lambda f: settings(f, bias="some"), "bias = 'some': one of none, all, lora_only"),
    "unknown key": (lambda f: settings(f, use_future=True), "use_future = true: it is not known here"),
    "more layers": (lambda f: settings(f, layer_replication=[[0, 2]]), "layer_replication .* another model"),
    "of certain tokens": (lambda f: settings(f, alora_invocation_tokens=[1]), "only after certain tokens"),
    "PiSSA": (lambda f: settings(f, init_lora_weights="pissa"), "init_lora_weights = 'pissa': .*would be there twice"),
    "LoftQ": (lambda f: settings(f, init_lora_weights="loftq"), "path_initial_model_for_weight_conversion"),
    "without PEFT's names": (without_prefix, "no name that PEFT gives"),
    "8 bits": (in_8_bits, "is stored as I8"),
    "float8": (in_float8, "is stored as F8_E4M3"),
}
ON_ITS_BASE: dict[str, tuple[Damage, str]] = {
    "wrong rank": (lambda f: settings(f, r=16), "q_proj.lora_A.weight has rank 8, and adapter_config.json says 16"),
    "DoRA left out": (lambda f: settings(f, use_dora=True), r"14 of 42 tensors are missing"),
    "fewer modules": (lambda f: settings(f, target_modules=["q_proj"]), r"has no place for .* \(24 of 28 tensors\)"),
    "no such module": (lambda f: settings(f, target_modules=["c_attn"]), "PEFT makes no adapter of it .*c_attn"),
    "no pattern": (lambda f: settings(f, target_modules="(q_proj"), "PEFT makes no adapter of it"),
    "half of the tensors": (without_half, "14 of 28 tensors are missing, the first is .*layers.1"),
    "A without B": (without_b, "1 of 28 tensors are missing, the first is .*q_proj.lora_B"),
    "another architecture": (of_other_names, "none of its 28 tensors has a place .* another model"),
    "more tokens": (with_more_tokens, r"embed_tokens.weight has 49,160 rows, the base's 2,252: .*resize_token"),
    "NaN": (not_a_number, "q_proj.lora_A.weight holds NaN or infinity"),
    "infinity": (infinite, "q_proj.lora_B.weight holds NaN or infinity"),
    "modules by number": (lambda f: settings(f, target_modules=[1, 2]), "PEFT makes no adapter of it"),
    "layers in words": (lambda f: settings(f, layers_to_transform="all"), "PEFT makes no adapter of it"),
    "untrained": (untrained, "q_proj.lora_B.weight is all zeros"),
    "another vocabulary": (another_vocabulary, "token .* was trained on a base with another vocabulary"),
    "tokens beyond the rows": (more_tokens_in_the_tokenizer, r"'<tool>' with the number 2,252, .* 2,252 rows"),
}

"""Adapters as others leave them: which are taken, what they come to, and one clear message for each that is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import MODULES, TOKENIZER, peft_adapter, small_base
from support.small_models import make_config, scratch

from pipeline.errors import PipelineError, UserError
from pipeline.model.adapter_file import read_adapter
from pipeline.model.adapter_folder import CONFIG, WEIGHTS, base_of, fit_to, read_given_adapter
from pipeline.model.merging import MergedWeights
from pipeline.model.trained_tokenizer import adapter_files, trained_tokenizer
from pipeline.model.weights_file import read_weights


@pytest.fixture(scope="module")
def good() -> Path:
    """An adapter that is right, with the tokenizer of its base."""
    folder = peft_adapter(scratch() / "good-adapter", small_base())
    for name in TOKENIZER:
        shutil.copy(small_base() / name, folder / name)
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


Damage = Callable[[Path], None]
BROKEN: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no settings": (lambda f: (f / CONFIG).unlink(), "has no adapter_config.json, without which"),
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], "holds no adapter: give the folder"),
    "settings cut short": (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json: cannot be read"),
    "settings of nothing": (lambda f: (f / CONFIG).write_text("[]"), "holds no settings"),
    "merged model": (merged, "is a whole model, into which nothing is left to be merged"),
    "trainer's folder": (of_checkpoints, r"in folders of its own \(checkpoint-20\): give one of them"),
    "MLX": (of_mlx, "an adapter of MLX"),
    "MLX, its settings gone": (of_mlx_without_settings, "an adapter of MLX"),
    "no tensors": (lambda f: (f / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "pickle": (pickled, "only as adapter_model.bin, a pickle, which can run code"),
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
    "wrong rank": (lambda f: settings(f, r=16), "q_proj.lora_A.weight has rank 8, and adapter_config.json says 16"),
    "DoRA left out": (lambda f: settings(f, use_dora=True), r"14 of 42 tensors are missing"),
    "fewer modules": (lambda f: settings(f, target_modules=["q_proj"]), r"has no place for .* \(24 of 28 tensors\)"),
    "no such module": (lambda f: settings(f, target_modules=["c_attn"]), "PEFT makes no adapter of it .*c_attn"),
    "no pattern": (lambda f: settings(f, target_modules="(q_proj"), "PEFT makes no adapter of it"),
    "half of the tensors": (without_half, "14 of 28 tensors are missing, the first is .*layers.1"),
    "A without B": (without_b, "1 of 28 tensors are missing, the first is .*q_proj.lora_B"),
    "another architecture": (of_other_names, "none of its 28 tensors has a place .* another model"),
    "without PEFT's names": (without_prefix, "no name that PEFT gives"),
    "more tokens": (with_more_tokens, r"embed_tokens.weight has 49,160 rows, the base's 49,152: .*resize_token"),
    "8 bits": (in_8_bits, "is stored as I8"),
    "NaN": (not_a_number, "q_proj.lora_A.weight holds NaN or infinity"),
    "untrained": (untrained, "q_proj.lora_B.weight is all zeros"),
    "another vocabulary": (another_vocabulary, "token .* was trained on a base with another vocabulary"),
    "tokens beyond the rows": (more_tokens_in_the_tokenizer, "'<tool>' with the number 49,152, .* 49,152 rows"),
}


def judged(folder: Path, base: Path) -> Any:
    fit = fit_to(read_given_adapter(folder), base)
    trained_tokenizer(make_config(model={"base": str(base)}, adapter={"path": folder}))
    return fit


@pytest.mark.parametrize("name", BROKEN)
def test_one_message_for_each_that_is_broken(good: Path, tmp_path: Path, name: str) -> None:
    damage, said = BROKEN[name]
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    damage(folder)
    with pytest.raises(UserError, match=said) as error:
        judged(folder, small_base())
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_another_base(good: Path) -> None:
    with pytest.raises(
        UserError, match=r"q_proj.lora_A.weight is \(8, 256\), on .* it would be \(8, 128\): .*it names"
    ):
        judged(good, small_base(hidden=128))


@pytest.mark.parametrize(
    ("lora", "modules"),
    [
        ({}, 14),
        ({"target_modules": "all-linear", "use_dora": True, "use_rslora": True}, 14),
        ({"rank_pattern": {"q_proj": 4, "model.layers.1.mlp.up_proj": 2}, "alpha_pattern": {"down_proj": 3}}, 14),
        ({"layers_to_transform": [1]}, 7),
        ({"target_modules": r".*layers\.0\..*(q_proj|up_proj)"}, 2),
        ({"target_modules": ["self_attn.q_proj", "model.layers.0.mlp.up_proj"], "exclude_modules": ["k_proj"]}, 3),
        ({"modules_to_save": ["norm"], "init_lora_weights": "orthogonal"}, 14),
    ],
)
def test_what_is_taken_names_its_modules(tmp_path: Path, lora: dict[str, Any], modules: int) -> None:
    folder = peft_adapter(tmp_path, small_base(), **lora)
    settings(folder, from_the_future=None, unsloth_fixed=True)
    adapter = read_given_adapter(folder)
    fit = fit_to(adapter, small_base())
    assert len(fit.modules) == modules
    assert not fit.settings.keys() & {"layers_to_transform", "exclude_modules", "from_the_future"}
    assert len(adapter.remarks) == 1
    assert adapter.remarks[0].endswith("all off: from_the_future")


def test_an_untied_head_may_be_saved_and_a_tied_one_not() -> None:
    untied = small_base(tied=False)
    folder = peft_adapter(scratch() / "with-head", untied, modules_to_save=["lm_head", "embed_tokens"])
    assert len(judged(folder, untied).modules) == 14
    with pytest.raises(UserError, match="the base's head is its embedding"):
        judged(folder, small_base())
    folder = peft_adapter(scratch() / "on-head", untied, target_modules=[*MODULES, "lm_head"])
    with pytest.raises(UserError, match="on the head is not merged here"):
        judged(folder, untied)


def test_the_base_that_it_names(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "adapter")
    for named, said in (("owner/name", ""), (None, "names no base"), ("/home/she/model", "not on this machine")):
        settings(tmp_path / "adapter", base_model_name_or_path=named)
        adapter = read_given_adapter(tmp_path / "adapter")
        if not said:
            assert base_of(adapter) == named
            continue
        with pytest.raises(UserError, match=f"{said}.*--base"):
            base_of(adapter)


def test_the_chat_template_is_the_adapters_then_the_bases_and_else_asked_for(good: Path, tmp_path: Path) -> None:
    folder, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(good, folder)
    shutil.copytree(small_base(), base)
    sections: dict[str, Any] = {"model": {"base": str(base)}, "adapter": {"path": folder}}
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    tokenizer, _ = trained_tokenizer(make_config(**sections))
    assert tokenizer.chat_template.startswith("{% for m in messages %}{{ m.content }}")
    (folder / "chat_template.jinja").unlink()
    tokenizer, said = trained_tokenizer(make_config(**sections))
    assert tokenizer.chat_template == (base / "chat_template.jinja").read_text()
    assert "the base's is taken" in said[0]
    (base / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"neither the adapter nor its base has a chat template.*--template"):
        trained_tokenizer(make_config(**sections))
    sections["model"]["chat_template"] = "chatml"
    tokenizer, _ = trained_tokenizer(make_config(**sections))
    assert "<|im_start|>" in tokenizer.chat_template


def test_of_a_checkpoint_only_what_is_safe_is_read(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "checkpoint-20")
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
        (tmp_path / "checkpoint-20" / name).write_bytes(b"\x80\x04")
    config = make_config(adapter={"path": tmp_path / "checkpoint-20"})
    assert {path.suffix for path in adapter_files(config)} == {".json", ".safetensors", ".jinja"}


def test_what_trained_a_tied_pair_as_one_is_taken(tmp_path: Path) -> None:
    """Single tokens too; half of such a pair is refused, and one that parted is no merge."""
    one = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    for name, lora in (("tokens", {"trainable_token_indices": [5, 7]}), ("saved", one)):
        folder = peft_adapter(tmp_path / name, small_base(), **lora)
        assert len(judged(folder, small_base()).modules) == 14
        merged = MergedWeights(read_weights(small_base()), read_adapter(folder))
        assert not torch.equal(
            merged["model.embed_tokens.weight"], read_weights(small_base())["model.embed_tokens.weight"]
        )
    head = "base_model.model.lm_head.weight"
    tensors(folder, lambda found: found.update({head: found[head] + 1}))
    with pytest.raises(PipelineError, match="lm_head.weight and .*embed_tokens.weight differ, and the base has one"):
        MergedWeights(read_weights(small_base()), read_adapter(folder))

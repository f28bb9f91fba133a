"""Adapters as others leave them: which are taken, what they come to, and one clear message for each that is not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import MODULES, peft_adapter, small_base
from support.broken_adapters import ON_ITS_BASE, broken, good_adapter, settings, tensors
from support.small_models import make_config, scratch

from pipeline.errors import PipelineError, UserError
from pipeline.model.adapter_file import read_adapter
from pipeline.model.adapter_folder import base_of, fit_to, read_given_adapter
from pipeline.model.merging import MergedWeights
from pipeline.model.trained_tokenizer import adapter_files, trained_tokenizer
from pipeline.model.weights_file import read_weights


def judged(folder: Path, base: Path) -> Any:
    fit = fit_to(read_given_adapter(folder), base)
    trained_tokenizer(make_config(model={"base": str(base)}, adapter={"path": folder}))
    return fit


@pytest.mark.parametrize("name", ON_ITS_BASE)
def test_one_message_for_each_that_does_not_fit(tmp_path: Path, name: str) -> None:
    """Those that show it by themselves are refused by the command: tests/test_adapter_project.py."""
    damage, said = ON_ITS_BASE[name]
    folder = broken(damage, tmp_path / "adapter")
    with pytest.raises(UserError, match=said) as error:
        judged(folder, small_base())
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_another_base() -> None:
    with pytest.raises(
        UserError, match=r"q_proj.lora_A.weight is \(8, 256\), on .* it would be \(8, 128\): .*it names"
    ):
        judged(good_adapter(), small_base(hidden=128))


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


def test_the_base_that_it_names(tmp_path: Path) -> None:
    shutil.copytree(good_adapter(), tmp_path / "adapter")
    for named, said in (("owner/name", ""), (None, "names no base"), ("/home/she/model", "not on this machine")):
        settings(tmp_path / "adapter", base_model_name_or_path=named)
        adapter = read_given_adapter(tmp_path / "adapter")
        if not said:
            assert base_of(adapter) == named
            continue
        with pytest.raises(UserError, match=f"{said}.*--base"):
            base_of(adapter)


def test_the_chat_template_is_the_adapters_then_the_bases_and_else_asked_for(tmp_path: Path) -> None:
    folder, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(good_adapter(), folder)
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


def test_of_a_checkpoint_only_what_is_safe_is_read(tmp_path: Path) -> None:
    shutil.copytree(good_adapter(), tmp_path / "checkpoint-20")
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

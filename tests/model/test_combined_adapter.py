"""Several adapters in one: PEFT's own numbers, by every method, and one clear message for what cannot be combined."""

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import TOKENIZER, peft_adapter, random_adapter, random_base, small_base
from support.small_models import make_config, scratch
from transformers import AutoModelForCausalLM

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.model.adapter_file import plain_name
from pipeline.model.adapter_folder import WEIGHTS, fit_to
from pipeline.model.combined_adapter import difference, read_given_adapters, write_combined
from pipeline.model.trained_tokenizer import trained_tokenizer

ONE = {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}
OTHER = {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 3}


def config_of(base: Path, adapters: list[dict[str, Any]], **adapter: Any) -> Config:
    return make_config(
        model={"base": str(base)}, data={"train": None}, adapters=adapters, adapter=adapter, train={"seed": 5}
    )


def two(tmp_path: Path, one: dict[str, Any], other: dict[str, Any], model_type: str = "llama") -> tuple[Path, ...]:
    """A base and two adapters, which differ."""
    base = random_base(tmp_path / "base", model_type)
    first, second = random_adapter(base, tmp_path / "a", **one), random_adapter(base, tmp_path / "b", **other)
    torch.manual_seed(7)
    found = load_file(second / WEIGHTS)
    save_file({name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in found.items()}, second / WEIGHTS)
    return base, first, second


def changes(tensors: dict[str, Any], scaling: float) -> dict[str, Any]:
    """What an adapter adds to each module."""
    stems = {name.replace(".lora_A.", ".lora_{}."): plain_name(name) for name in tensors if ".lora_A." in name}
    return {
        module: scaling * tensors[stem.format("B")].double() @ tensors[stem.format("A")].double()
        for stem, module in stems.items()
    }


def by_peft(base: Path, first: Path, second: Path, weights: list[float], way: str, density: float | None) -> Any:
    """PEFT's combination: its tensors, named as in a file, and its scaling by module."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole = PeftModel.from_pretrained(model, first, adapter_name="first")
    whole.load_adapter(second, adapter_name="second")
    torch.manual_seed(5)
    whole.add_weighted_adapter(["first", "second"], weights, "both", combination_type=way, density=density)
    named = {name: parameter.detach() for name, parameter in whole.named_parameters() if ".both." in name}
    return {name.replace(".both", ""): parameter for name, parameter in named.items()}


@pytest.mark.parametrize(
    ("way", "density", "one", "other", "model_type"),
    [
        ("cat", None, ONE | {"r": 2}, OTHER, "llama"),
        ("svd", None, ONE | {"r": 2}, OTHER, "llama"),
        ("svd", None, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, {"target_modules": ["c_fc"]}, "gpt2"),
        ("linear", None, ONE, OTHER, "llama"),
        ("ties", 0.4, ONE, OTHER, "llama"),
        ("magnitude_prune", 0.4, ONE, OTHER, "llama"),
        ("ties_svd", 0.4, ONE, OTHER, "llama"),
    ],
)
def test_the_numbers_are_those_of_peft(
    way: str, density: float | None, one: dict[str, Any], other: dict[str, Any], model_type: str, tmp_path: Path
) -> None:
    base, first, second = two(tmp_path, one, other, model_type)
    expected = by_peft(base, first, second, [0.7, -1.5], way, density)
    tables = [{"path": first, "weight": 0.7}, {"path": second, "weight": -1.5}]
    config = config_of(base, tables, combine=way, **({"density": density} if density else {}))
    combined = write_combined(config, read_given_adapters(config), tmp_path / "combined")
    ours = load_file(combined.folder / WEIGHTS)
    assert {plain_name(name) for name in ours} == {plain_name(name) for name in expected}
    if "svd" not in way:  # whose factors may have other signs
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor), name
    theirs = changes(expected, 1.0)
    for module, change in changes(ours, combined.settings["lora_alpha"] / combined.settings["r"]).items():
        assert torch.allclose(change, theirs[module], atol=1e-5), module
        assert change.abs().max() > 1e-3
    assert len(fit_to(combined, base).modules) == len(theirs)


@pytest.mark.parametrize("way", ["dare_linear", "dare_ties_svd"])
def test_what_dare_leaves_out_is_drawn_with_the_seed(way: str, tmp_path: Path) -> None:
    base, first, second = two(tmp_path, ONE, ONE)
    config = config_of(base, [{"path": first}, {"path": second}], combine=way, density=0.5)
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 6})})
    given = read_given_adapters(config)
    assert difference(*given) > 0.1
    written = [
        write_combined(settings, read_given_adapters(settings), tmp_path / str(number))
        for number, settings in enumerate((config, config, other))
    ]
    assert (written[0].folder / WEIGHTS).read_bytes() == (written[1].folder / WEIGHTS).read_bytes()
    assert difference(written[0], written[1]) < 1e-6
    assert difference(written[0], written[2]) > 0.1


@cache
def right() -> Path:
    return peft_adapter(scratch() / "combined-right", small_base())


def of_another_base(folder: Path) -> None:
    peft_adapter(folder, small_base(tied=False))


def dora(folder: Path) -> None:
    peft_adapter(folder, small_base(), use_dora=True)


def biased(folder: Path) -> None:
    peft_adapter(folder, small_base(), bias="all")


def saved(folder: Path) -> None:
    peft_adapter(folder, small_base(), modules_to_save=["lm_head"])


def of_tokens(folder: Path) -> None:
    peft_adapter(folder, small_base(), trainable_token_indices=[5, 7])


def of_another_rank(folder: Path) -> None:
    peft_adapter(folder, small_base(), rank_pattern={"q_proj": 4})


def with_another_template(folder: Path) -> None:
    shutil.copytree(right(), folder)
    for name in TOKENIZER:
        shutil.copy(small_base() / name, folder / name)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


REFUSED: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "another base": (of_another_base, {}, r"on .*base-256, .* on .*-256-untied: only adapters of one base"),
    "DoRA": (dora, {}, "it is DoRA .* only products of two matrices can be combined"),
    "biases": (biased, {}, "it trained biases"),
    "saved modules": (saved, {}, "whole modules of its own"),
    "tokens": (of_tokens, {}, "trained single tokens"),
    "another rank": (of_another_rank, {"combine": "linear"}, r"q_proj has 8 in .*a and 4 in .*b: take \"cat\" or"),
    "another template": (with_another_template, {}, "trained with another chat template than"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_combined_is_said(name: str, tmp_path: Path) -> None:
    make, adapter, said = REFUSED[name]
    shutil.copytree(right(), tmp_path / "a")
    make(tmp_path / "b")
    config = config_of(small_base(), [{"path": tmp_path / "a"}, {"path": tmp_path / "b"}], **adapter)
    with pytest.raises(UserError, match=said) as refused:
        assert read_given_adapters(config)
        trained_tokenizer(config)
    assert "\n" not in str(refused.value)


def test_of_adapters_that_cancel_out_nothing_is_left(tmp_path: Path) -> None:
    base, first, _ = two(tmp_path, ONE, ONE)
    shutil.copytree(first, tmp_path / "same")
    tables = [{"path": first}, {"path": tmp_path / "same", "weight": -1.0}]
    config = config_of(base, tables, combine="linear")
    with pytest.raises(UserError, match=r"nothing is left of them in model\.layers\.0\.mlp\.down_proj: give other"):
        write_combined(config, read_given_adapters(config), tmp_path / "combined")


def test_4_bits_and_another_owner_are_the_same_base(tmp_path: Path) -> None:
    base, first, second = two(tmp_path, ONE, OTHER)
    for folder, named in ((first, "meta-llama/Llama-3.2-1B"), (second, "unsloth/llama-3.2-1b-unsloth-bnb-4bit")):
        path = folder / "adapter_config.json"
        path.write_text(re.sub(r'("base_model_name_or_path": )"[^"]*"', rf'\1"{named}"', path.read_text()))
    assert len(read_given_adapters(config_of(base, [{"path": first}, {"path": second}]))) == 2

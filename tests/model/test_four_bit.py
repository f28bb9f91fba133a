"""A base in bitsandbytes' 4 bits: what its weights unpack to. tests/test_whole_way.py trains on one."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import bases
from support.adapters import merged_by_peft, random_adapter
from support.small_models import make_config, make_task

from benchmarks.small_base import write_small_base
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.model import derived_folder
from pipeline.model.base import resolve_base
from pipeline.model.facts import facts
from pipeline.model.four_bit import in_16bit, is_4bit
from pipeline.model.merge_target import check_bits, merge_files, sixteen_bit_base
from pipeline.model.nf4 import Record
from pipeline.model.weights_file import read_weights
from pipeline.resources import resource
from pipeline.stages import merge
from pipeline.verify import merge_base
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import FAIL, PASS
from pipeline.verify.weights import check_merge


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as bitsandbytes saves it."""
    return write_small_base(tmp_path_factory.mktemp("four-bit") / "base-bnb", "llama2", four_bit=True)


def config(base: Path, **sections: Any) -> Config:
    return Config.model_validate({"model": {"base": str(base)}, "data": {"train": "x"}, **sections})


def test_it_is_a_base(four_bit: Path) -> None:
    assert resolve_base(str(four_bit)) == four_bit
    assert is_4bit(four_bit)
    check_bits(four_bit, config(four_bit))
    elsewhere = {"data": {"train": None}, "adapter": {"path": "x"}, "train": {"load_in_4bit": False}}
    check_bits(four_bit, config(four_bit, **elsewhere))  # how it was loaded where the adapter was trained is not known
    plain = bases.base("llama-16bit", "llama2")
    assert facts(str(four_bit)) == facts(str(plain))  # as many weights, the packed ones counted


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"load_in_4bit": False}}, "train.load_in_4bit = false: model.base"),
        ({"merge": {"base": "16bit"}}, 'merge.base = "16bit": model.base'),
    ],
)
def test_what_does_not_go_with_it(four_bit: Path, tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        check_bits(four_bit, config(four_bit, **sections))
    assert words in str(error.value)
    assert "the 16-bit model as the base" in str(error.value)
    with pytest.raises(UserError, match=re.escape(str(error.value))):  # where rows were checked before the key was set
        merge.main(make_task(tmp_path, "merge", model={"base": str(four_bit)}, **sections))
    check_bits(bases.base("llama-16bit", "llama2"), config(four_bit, **sections))


def other(folder: Path, change: str) -> Path:
    """The 16-bit model, but for one thing."""
    plain = bases.base("llama-16bit", "llama2")
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    if change == "rope":
        config["rope_parameters"]["rope_theta"] = 500000.0
    elif change in ("shape", "names"):
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        taken = tensors.pop(name)
        tensors[name if change == "shape" else f"{name}s"] = taken[:-1] if change == "shape" else taken
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif change == "weights":
        tensors = load_file(folder / "model.safetensors")
        tensors = {name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rope", "its rope_parameters is"),
        ("shape", "its tensor model.layers.1.mlp.up_proj.weight is (511, 256), the base's (512, 256)"),
        ("names", "its tensor model.layers.1.mlp.up_proj.weight is not there, the base's (512, 256)"),
        ("weights", "away from the base's, which 4 bits do not explain"),
    ],
)
def test_another_model_than_its_own_is_refused(four_bit: Path, tmp_path: Path, change: str, words: str) -> None:
    given = other(tmp_path / "other", change)
    with pytest.raises(UserError) as error:
        check_bits(four_bit, config(four_bit, merge={"model": str(given)}))
    assert str(error.value).startswith(f"merge.model: {given} is not the 16-bit model of {four_bit}: ")
    assert words in str(error.value)


@pytest.mark.parametrize("other", [{"merge": {"base": "dequantized"}}, {"model": {"trust_remote_code": True}}])
def test_two_keys_that_do_not_go_together(other: dict[str, dict[str, Any]]) -> None:
    given = {"model": {"base": "x"}, "data": {"train": "x"}, "merge": {"model": "y"}}
    with pytest.raises(ValueError, match="merge.model does not go with"):
        Config.model_validate({section: table | other.get(section, {}) for section, table in given.items()})


@pytest.mark.parametrize(
    ("base", "named", "words"),
    [
        ("four bits", "no-such-folder", "merge.model: no-such-folder: no such folder, no packaged model"),
        ("four bits", "four bits", "is stored in 4 bits too: give the 16-bit model"),
        ("16 bits", "16 bits", "is in 16 bits itself, and is what is merged into: remove the key"),
    ],
)
def test_what_cannot_be_merged_into(four_bit: Path, base: str, named: str, words: str) -> None:
    folders = {"four bits": four_bit, "16 bits": bases.base("llama-16bit", "llama2")}
    settings = config(folders[base], merge={"model": str(folders.get(named, named))})
    with pytest.raises(UserError) as error:
        check_bits(folders[base], settings)
    assert words in str(error.value)
    if base != named:  # before anything is begun
        with pytest.raises(UserError, match=re.escape(words)):
            merge_files(settings)


@pytest.mark.parametrize(
    ("way", "added"), [("tensors", ()), ("tensors", ("<|im_start|>", "<|im_end|>")), ("peft", ("<|im_start|>",))]
)
def test_an_adapter_on_it_becomes_part_of_the_model_that_is_named(
    four_bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, added: tuple[str, ...]
) -> None:
    """In bytes: its weights and the adapter, summed in float32 and rounded once; not what the 4 bits unpack to."""
    import torch

    monkeypatch.setattr(derived_folder, "cache_folder", lambda: tmp_path / "cache")
    given, run = bases.base("llama-16bit", "llama2"), tmp_path / "run"
    model = {"base": str(four_bit), "chat_template": "zephyr", "add_tokens": added}
    sections = {"model": model, "merge": {"model": str(given), "base": "16bit", "way": way}}
    named = sixteen_bit_base(make_config(**sections), tmp_path / "unpacked")
    rows = list(range(32_000, 32_000 + len(added)))
    new = {"trainable_token_indices": {"model.embed_tokens": rows, "lm_head": rows}} if added else {}
    adapter = random_adapter(named, run / "train" / "adapter", target_modules=["q_proj", "down_proj"], **new)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(named / name, adapter / name)
    shutil.copy(resource("templates/chat/zephyr.jinja"), adapter / "chat_template.jinja")
    projections = [name.removesuffix(".weight") for name in read_weights(named).shapes if "_proj." in name]
    Record(frozenset(projections)).write(run / "train")
    figures = merge.main(make_task(run, "merge", **sections))
    assert figures["merged_into"] == "16bit"
    assert json.loads((run / "merge" / "base.json").read_text())["why"] == f"merge.model names it: {given}"

    expected, found = merged_by_peft(named, adapter), read_weights(run / "merge" / "model")
    before = read_weights(named)
    assert set(found.shapes) == set(before.shapes)
    for name in found.shapes:
        assert torch.equal(found[name], expected[name].to(torch.bfloat16)), name
    changed = (found["lm_head.weight"] != before["lm_head.weight"]).any(1).nonzero().flatten().tolist()
    assert changed == rows

    artefacts = Artefacts.of_run(run, make_task(run, "verify", **sections).config, tmp_path)
    assert {result.verdict for result in check_merge(artefacts)} == {PASS}
    (said,) = merge_base.check(artefacts)
    assert said.words == f"nothing was measured: merge.model names it: {given}"
    if not added:
        unpacked = Artefacts.of_run(run, make_config(model=model), tmp_path)
        assert FAIL in {result.verdict for result in check_merge(unpacked)}


def test_its_weights_unpack_to_what_an_adapter_sees(four_bit: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    plain = bases.base("llama-16bit", "llama2")
    assert in_16bit(plain, tmp_path / "none") == plain
    folder = in_16bit(four_bit, tmp_path / "unpacked")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    unpacked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    seen = AutoModelForCausalLM.from_pretrained(four_bit, device_map="cpu").dequantize(dtype=torch.bfloat16)
    own = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).state_dict()
    assert seen.state_dict().keys() == unpacked.keys() == own.keys()
    changed = set()
    for name, tensor in seen.state_dict().items():
        assert torch.equal(tensor, unpacked[name]), name
        changed |= {name.rpartition(".")[0].rpartition(".")[2]} if not torch.equal(tensor, own[name]) else set()
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert resolve_base(str(folder)) == folder

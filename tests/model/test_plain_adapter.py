"""What becomes of an adapter's numbers on the way to a GGUF adapter, and which adapters cannot go it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import merged_by_peft, peft_adapter, random_adapter, random_base, small_base
from support.commands import pipeline
from support.small_models import make_config, scratch

from pipeline.errors import PipelineError, UserError
from pipeline.model.adapter_file import read_adapter
from pipeline.model.nf4 import Record
from pipeline.model.plain_adapter import write_plain
from pipeline.model.weights_file import read_weights
from pipeline.stages import convert


@pytest.mark.parametrize(
    ("model_type", "lora"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        ("llama", {"target_modules": ["v_proj", "up_proj"], "alpha_pattern": {"up_proj": 3}}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_alpha_by_rank_times_both_matrices_is_what_peft_adds(
    model_type: str, lora: dict[str, Any], tmp_path: Path
) -> None:
    """As llama.cpp will add it: to the tensors of the base's files, by one alpha."""
    base, folder = random_base(tmp_path / "base", model_type), random_adapter(tmp_path / "base", tmp_path / "a", **lora)
    stored, plain = read_weights(base), tmp_path / "plain"
    turned = model_type == "gpt2"
    modules = {name.removesuffix(".weight") for name in merged_by_peft(base, folder) if name.endswith(".weight")}
    record = Record(transposed=frozenset(modules) if turned else frozenset(), in_4bit=frozenset())
    numbers = write_plain(read_adapter(folder), record, stored, plain)
    tensors, alpha = load_file(plain / "adapter_model.safetensors"), read_adapter(plain).settings["lora_alpha"]
    merged, checked, counted = merged_by_peft(base, folder), 0, 0
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        place = name.removeprefix("base_model.model.").replace(".lora_A", "")
        a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
        in_model = next(full for full in merged if full.endswith(place))
        expected = merged[in_model].detach().double() - stored[place].double()
        assert torch.allclose(alpha / a.shape[0] * (b @ a), expected, atol=1e-6)
        assert expected.abs().max() > 1e-3
        checked, counted = checked + 1, counted + b.numel()
    assert checked == sum(".lora_A." in name for name in read_weights(folder).shapes) > 0
    assert counted == numbers


@pytest.mark.parametrize(
    ("lora", "why"),
    [
        ({"use_dora": True}, "it is DoRA"),
        ({"bias": "lora_only"}, "it trained biases"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save: embed_tokens"),
    ],
)
def test_what_a_gguf_adapter_cannot_hold(lora: dict[str, Any], why: str, tmp_path: Path) -> None:
    base = random_base(tmp_path / "base")
    folder = random_adapter(base, tmp_path / "adapter", **lora)
    with pytest.raises(UserError, match=rf"{why}.*take export\.as = \"merged\""):
        write_plain(read_adapter(folder), Record(frozenset(), frozenset()), read_weights(base), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_it_is_refused_before_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dora = scratch() / "dora-for-gguf"
    if not dora.exists():
        peft_adapter(dora, small_base(converts=True), use_dora=True)
    monkeypatch.chdir(tmp_path)
    told = pipeline("export", "--adapter", dora, "--as", "adapter")
    assert told.exit_code == 2
    assert "it is DoRA" in told.stderr
    run = tmp_path / "dora-for-gguf-export" / "run"
    assert not (run / "train").exists()
    assert not (run / "merge").exists()


@pytest.mark.parametrize(
    ("section", "key", "value"), [("lora", "dora", True), ("lora", "bias", "all"), ("merge", "base", "dequantized")]
)
def test_keys_that_do_not_go_with_it(section: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{section}\.{key} = .*does not go with export\.as = \"adapter\""):
        make_config(export={"as": "adapter"}, **{section: {key: value}})
    assert make_config(**{section: {key: value}}).export.as_ == "merged"


def test_a_module_that_the_converter_leaves_out_is_missed(tmp_path: Path) -> None:
    """It drops in silence what its model class filters; here a head that the base ties to its embedding."""
    from support.shared_base import config_of, run_of

    from pipeline.run.layout import Layout
    from pipeline.run.stage import Task

    run = tmp_path / "run"
    shutil.copytree(run_of("one"), run)
    weights = Layout(run).adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    for side, shape in (("A", (8, 256)), ("B", (256, 8))):
        tensors[f"base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq.lora_{side}.weight"] = torch.ones(shape)
    from safetensors.torch import save_file

    save_file(tensors, weights, {"format": "pt"})
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(PipelineError, match=r"B matrices|converter"):
        convert.main(Task(convert.STAGE, config_of("one"), run, output, "", tmp_path / "scratch"))

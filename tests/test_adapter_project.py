"""`pipeline export --adapter`: one message for each folder that is none to be exported, and nothing left of it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from support.adapters import small_base
from support.broken_adapters import BY_ITSELF, ON_ITS_BASE, broken, good_adapter
from support.commands import pipeline

from pipeline.model.adapter_folder import CONFIG, WEIGHTS, fit_to, read_given_adapter
from pipeline.toml_file import load_config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is typed: an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def export(adapter: Path, base: Path | str, *options: str) -> Result:
    return pipeline("export", "--adapter", adapter, "--base", base, *options)


def is_refused(told: Result, said: str) -> None:
    assert isinstance(told.exception, SystemExit), told.exception  # not another, with its traceback
    assert told.exit_code == 2
    *before, message = told.stderr.splitlines()
    assert message.startswith("error: ")
    assert re.search(said, message), told.stderr
    assert not any("error" in line for line in before)


@pytest.mark.parametrize("name", BY_ITSELF)
def test_what_a_folder_shows_by_itself_is_said_before_anything_is_written(
    tmp_path: Path, here: Path, name: str
) -> None:
    damage, said = BY_ITSELF[name]
    folder = broken(damage, tmp_path / "adapter")
    told = export(folder, small_base())
    is_refused(told, said)
    assert told.stderr.count("\n") == 1
    assert str(folder) in told.stderr
    assert not list(here.iterdir())


def test_what_does_not_fit_is_said_before_anything_long(tmp_path: Path, here: Path) -> None:
    damage, said = ON_ITS_BASE["another vocabulary"]
    is_refused(export(broken(damage, tmp_path / "adapter"), small_base()), said)
    run = here / "adapter-export" / "run"
    assert not (run / "manifest.json").exists()
    assert not list(run.rglob("*.safetensors"))


def in_gptq(folder: Path) -> Path:
    """A base that another tool has quantized."""
    shutil.copytree(small_base(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_base_that_is_none(tmp_path: Path, here: Path) -> None:
    for base, said in (
        ("nowhere", "nowhere: no such folder, no packaged model and no hub id"),
        (tmp_path / "nowhere", "nowhere: no such folder, no packaged model and no hub id"),
        (in_gptq(tmp_path / "gptq"), "gptq"),
        (good_adapter(), "holds an adapter, not a model"),
    ):
        is_refused(export(good_adapter(), base), said)
        assert not list(here.iterdir())


def of_mlx(folder: Path) -> Path:
    """An adapter as mlx_lm saves it: its matrices transposed, by names of its own, with a scale."""
    found = load_file(good_adapter() / WEIGHTS)
    named = {
        re.sub(r"base_model\.model\.(.*)\.lora_([AB])\.weight", lambda m: f"{m[1]}.lora_{m[2].lower()}", name): value
        for name, value in found.items()
    }
    folder.mkdir()
    save_file({name: value.T.contiguous() for name, value in named.items()}, folder / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0}}
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder


def test_an_adapter_of_mlx_is_written_as_one_of_peft(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds to a module what MLX adds: scale x A B, transposed."""
    monkeypatch.setattr("pipeline.cli.bring_up_to_date", lambda *_: None)
    folder = of_mlx(tmp_path / "mlx")
    assert "give its base as MLX found it" in pipeline("export", "--adapter", folder).stderr
    for _ in range(2):
        told = export(folder, small_base())
        assert told.exit_code == 0, told.stderr
    config, _ = load_config(here / "mlx-export" / "pipeline.toml")
    assert config.adapter.path == here / "mlx-export" / "mlx-peft"
    adapter = read_given_adapter(config.adapter.path)
    assert len(fit_to(adapter, small_base()).modules) == 14
    theirs = {name: value.numpy() for name, value in load_file(folder / "adapters.safetensors").items()}
    scaling = adapter.settings["lora_alpha"] / adapter.settings["r"]
    for name in (name.removesuffix(".lora_a") for name in theirs if name.endswith(".lora_a")):
        a, b = (adapter.weights[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        change = 20.0 * theirs[f"{name}.lora_a"] @ theirs[f"{name}.lora_b"]
        assert torch.allclose(scaling * b @ a, torch.from_numpy(change).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type = 'dora'"),
        ({"lora_parameters": {"rank": 8, "alpha": 16, "scale": 10.0}}, "lora_parameters.alpha, of an older mlx_lm"),
        ({"lora_parameters": {"rank": 8}}, "no lora_parameters with a rank and a scale"),
        ({"lora_parameters": None}, "no lora_parameters with a rank and a scale"),
    ],
)
def test_one_of_mlx_that_is_not_understood(tmp_path: Path, here: Path, changed: dict[str, object], said: str) -> None:
    path = of_mlx(tmp_path / "mlx") / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    is_refused(export(path.parent, small_base()), f"{said}.*mlx_lm.fuse")
    assert not list(here.iterdir())

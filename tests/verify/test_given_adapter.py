"""Somebody else's merge, with the adapter that went into it: the first broken link is named, and what is not known."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import TOKENIZER, peft_adapter, small_base
from support.small_models import scratch

from pipeline.config import Verify
from pipeline.errors import UserError
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.chain import verify
from pipeline.verify.result import FAIL, NOT_RUN, PASS


@pytest.fixture(scope="module")
def export() -> Path:
    """An adapter, and the folder that PEFT itself merged it into."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = scratch() / "somebodys-export"
    base = small_base()
    adapter = peft_adapter(folder / "adapter", base, layers_to_transform=[1], use_rslora=True)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    model.merge_and_unload().to(torch.bfloat16).save_pretrained(folder / "merged")
    for name in TOKENIZER:
        shutil.copy(base / name, folder / "merged" / name)
    return folder


def judged(folder: Path, scratch: Path) -> dict[str, Any]:
    artefacts = Artefacts(Verify(), folder / "merged", None, {}, scratch)
    artefacts.add_adapter(folder / "adapter")
    return verify(artefacts, ("train", "merge"), ("adapter", "weights", "special_tokens"))


def verdicts(content: dict[str, Any], verdict: str) -> set[str]:
    return {check["id"] for check in content["checks"] if check["verdict"] == verdict}


def test_a_merge_that_is_right(export: Path, tmp_path: Path) -> None:
    content = judged(export, tmp_path)
    assert verdicts(content, FAIL) == set()
    assert {"adapter.fits", "weights.merged", "weights.untouched", "special_tokens.eos"} <= verdicts(content, PASS)
    assert {"adapter.data", "adapter.prompt"} <= verdicts(content, NOT_RUN)  # said, and not passed over


def settings(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def another_scaling(folder: Path) -> None:
    settings(folder / "adapter" / "adapter_config.json", lora_alpha=32)


def of_another_rank(folder: Path) -> None:
    settings(folder / "adapter" / "adapter_config.json", r=4)


def not_merged(folder: Path) -> None:
    shutil.copy(small_base() / "model.safetensors", folder / "merged")


def more_changed(folder: Path) -> None:
    tensors = load_file(folder / "merged" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, folder / "merged" / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "first", "said"),
    [
        (of_another_rank, "adapter.fits", "has rank 8, and adapter_config.json says 4"),
        (another_scaling, "weights.merged", "has its adapter 0.500 times"),
        (not_merged, "weights.merged", "its adapter was not merged"),
        (more_changed, "weights.untouched", "layers.0.mlp.up_proj.weight differs from the base"),
    ],
)
def test_the_first_broken_link(
    export: Path, tmp_path: Path, damage: Callable[[Path], None], first: str, said: str
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(export, folder)
    damage(folder)
    content = judged(folder, tmp_path)
    assert content["first_broken"]["id"] == first
    assert said in content["first_broken"]["words"]


def test_a_base_that_is_not_here(export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "export")
    settings(tmp_path / "export" / "adapter" / "adapter_config.json", base_model_name_or_path="/home/she/base")
    with pytest.raises(UserError, match="not on this machine.*--base"):
        judged(tmp_path / "export", tmp_path)

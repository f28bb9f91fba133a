"""`pipeline verify --hf --gguf` on exports that this program had no part in: PEFT's merge, llama.cpp's own commands."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.good_run import good_run, rewrite_gguf
from support.small_models import base_folder, original_gguf, scratch

from pipeline.cli import main
from pipeline.config import Verify
from pipeline.llamacpp.programs import program, source_tree
from pipeline.stages import judged_stages
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.chain import EXPORT_CHECKS
from pipeline.verify.chain import verify as run
from pipeline.verify.folders import show

QUICK = ("--set", "verify.tokens=300", "--set", "verify.strings=300", "--set", "verify.stopping_prompts=1")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged folder, its 16-bit GGUF file and its Q4_K_M file, by hand."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("export")
    base = AutoModelForCausalLM.from_pretrained(good_run() / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, good_run() / "train" / "adapter").merge_and_unload()
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(good_run() / "train" / "adapter").save_pretrained(folder / "model")
    converter = [sys.executable, source_tree() / "convert_hf_to_gguf.py", folder / "model", "--outtype", "bf16"]
    subprocess.run([*converter, "--outfile", folder / "mine.gguf"], check=True, capture_output=True)
    quantize = [program("llama-quantize"), folder / "mine.gguf", folder / "mine-Q4_K_M.gguf", "Q4_K_M"]
    subprocess.run(quantize, check=True, capture_output=True)
    return folder


def verify(hf: Path, gguf: Path) -> dict[str, Any]:
    """verify.json, as the command makes it; what the pinned converter makes of a folder is made once."""
    settings = Verify(tokens=250, strings=300, stopping=0, stopping_prompts=1)
    again = scratch() / "export" / hf.parent.name
    again.mkdir(parents=True, exist_ok=True)
    return run(Artefacts.of_export(hf, gguf, settings, again), judged_stages(), EXPORT_CHECKS)


def failed(content: dict[str, Any]) -> dict[str, str]:
    """The failures and what they say."""
    return {row["id"]: row["words"] for row in content["checks"] if row["verdict"] == "fail"}


@pytest.mark.parametrize("name", ["mine.gguf", "mine-Q4_K_M.gguf"])
def test_a_good_export_passes(export: Path, name: str) -> None:
    content = verify(export / "model", export / name)
    assert not failed(content)
    verdicts = {row["id"]: row["verdict"] for row in content["checks"]}
    passed = {id for id, verdict in verdicts.items() if verdict == "pass"}
    assert passed >= {"tokenizer.ids", "prompt.llamacpp", "weights.metadata", "stopping.llamacpp"}
    assert ("logits.mean" if name == "mine.gguf" else "logits.quantized") in passed
    # What it cannot know is said not to have run.
    assert verdicts["weights.merged"] == verdicts["prompt.ollama"] == "not run"


def test_a_published_file_passes() -> None:
    """The packaged base's own GGUF, of another version of the converter."""
    content = verify(base_folder(), original_gguf())
    assert not failed(content)
    assert {row["id"] for row in content["checks"] if row["verdict"] == "pass"} >= {
        *("tokenizer.ids", "tokenizer.special", "prompt.llamacpp", "prompt.tokens", "weights.metadata"),
        *("quantization.types", "quantization.error", "logits.quantized"),
    }


def other_end(metadata: dict[str, Any], _: Any) -> None:
    metadata["tokenizer.ggml.eos_token_id"] = 0


def no_template(metadata: dict[str, Any], _: Any) -> None:
    del metadata["tokenizer.chat_template"]


def other_splitting(metadata: dict[str, Any], _: Any) -> None:
    metadata["tokenizer.ggml.pre"] = "gpt-2"


@pytest.mark.parametrize(
    ("damage", "name", "check"),
    [
        (other_end, "mine.gguf", "tokenizer.special"),
        (no_template, "mine-Q4_K_M.gguf", "prompt.template"),
        (other_splitting, "mine-Q4_K_M.gguf", "tokenizer.pre"),
    ],
)
def test_a_broken_export_is_named(
    export: Path, tmp_path: Path, damage: Callable[..., None], name: str, check: str
) -> None:
    shutil.copy(export / name, tmp_path / name)
    rewrite_gguf(tmp_path / name, damage)
    content = verify(export / "model", tmp_path / name)
    assert check in failed(content)
    assert content["first_broken"]["stage"].partition("/")[0] == ("convert" if name == "mine.gguf" else "quantize")


def test_the_command(export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The folder of one fine-tune, the file of another: the commonest mistake of all."""
    other = tmp_path / "other"
    shutil.copytree(export / "model", other)
    change(other / "model.safetensors")
    arguments = ["verify", "--hf", other, "--gguf", export / "mine-Q4_K_M.gguf", *QUICK, "--json"]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 1
    content = json.loads(capfd.readouterr().out)  # and nothing else is printed there, by no program
    assert "blk.1.ffn_up.weight" in failed(content)["quantization.error"]
    show(content)
    table = capfd.readouterr().out
    assert f"the first broken stage is quantize/q4_k_m: {content['first_broken']['id']}" in table
    assert "not run" in table


def change(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] *= -1
    save_file(tensors, path, {"format": "pt"})

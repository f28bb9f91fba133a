"""`pipeline verify --hf --gguf` on exports that this program had no part in: PEFT's merge, llama.cpp's own commands."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artefacts import base_folder, original_gguf
from good_run import good_run, rewrite_gguf

from pipeline.llamacpp.programs import program, source_tree

QUICK = ("--set", "verify.tokens=600", "--set", "verify.strings=600", "--set", "verify.stopping=0")


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


def verify(hf: Path, gguf: Path) -> tuple[int, dict[str, Any], str]:
    """Exit status, verify.json and what was said."""
    command = [sys.executable, "-m", "pipeline", "verify", "--hf", hf, "--gguf", gguf, "--json", *QUICK]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in answer.stderr
    return answer.returncode, json.loads(answer.stdout), answer.stderr


@pytest.mark.parametrize("name", ["mine.gguf", "mine-Q4_K_M.gguf"])
def test_a_good_export_passes(export: Path, name: str) -> None:
    status, content, _ = verify(export / "model", export / name)
    failed = [(row["id"], row["words"]) for row in content["checks"] if row["verdict"] == "fail"]
    assert not failed
    assert status == 0
    passed = {row["id"] for row in content["checks"] if row["verdict"] == "pass"}
    assert passed >= {"tokenizer.ids", "prompt.llamacpp", "weights.metadata", "stopping.llamacpp"}
    assert ("logits.mean" if name == "mine.gguf" else "logits.quantized") in passed
    # What it cannot know is said not to have run.
    missing = {row["id"]: row["verdict"] for row in content["checks"]}
    assert missing["weights.merged"] == missing["prompt.ollama"] == "not run"


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
    status, content, _ = verify(export / "model", tmp_path / name)
    assert status == 1
    assert check in {row["id"] for row in content["checks"] if row["verdict"] == "fail"}
    assert content["first_broken"]["rung"].partition("/")[0] == ("convert" if name == "mine.gguf" else "quantize")


def test_a_file_of_another_model(export: Path) -> None:
    """The folder of one fine-tune, the file of another: the commonest mistake of all."""
    status, content, _ = verify(base_folder(), export / "mine.gguf")
    assert status == 1
    assert "weights.gguf" in {row["id"] for row in content["checks"] if row["verdict"] == "fail"}


def test_a_published_file(tmp_path: Path) -> None:
    """The packaged model's own GGUF file, made years ago by somebody else, against the folder that was unpacked."""
    path = tmp_path / "smollm2-Q4_1.gguf"
    shutil.copy(original_gguf(), path)
    status, content, _ = verify(base_folder(), path)
    verdicts = {row["id"]: row["verdict"] for row in content["checks"]}
    assert verdicts["tokenizer.ids"] == verdicts["logits.quantized"] == "pass", (status, content["first_broken"])

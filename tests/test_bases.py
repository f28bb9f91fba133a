"""Bases of other architectures, from data to GGUF: what is merged is what was trained, the rest is untouched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from support import bases

from pipeline.config import Config
from pipeline.verify import trained_labels, weights
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import FAIL, PASS


@pytest.mark.parametrize(
    ("model_type", "tokenizer", "modules"),
    [("gemma3", "gemma3", 7), ("phi3", "qwen3", 4), ("gpt2", "qwen3", 4)],
)
@pytest.mark.parametrize("merge_base", ["dequantized"])
def test_trained_merged_and_converted(
    model_type: str, tokenizer: str, modules: int, merge_base: str, tmp_path: Path
) -> None:
    base = bases.base(f"whole-{model_type}", tokenizer, model_type)
    path = bases.project(tmp_path / "project", base, f'[merge]\nbase = "{merge_base}"\n', rows=8)
    command = [sys.executable, "-m", "pipeline", "run", str(path), "--no-preflight", "--until", "convert"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "project" / "run"
    figures = json.loads((run / "manifest.json").read_text())["stages"]
    assert figures["merge"]["figures"]["modules_merged"] == 2 * modules
    assert figures["data"]["figures"]["adapter_parameters"] == figures["train"]["figures"]["trained_parameters"]
    with safe_open(run / "train" / "adapter" / "adapter_model.safetensors", "np") as adapter:
        assert not [name for name in adapter.keys() if "vision" in name]  # noqa: SIM118
    settings = Config.model_validate_json((run / "config.json").read_text())
    artefacts = Artefacts.of_run(run, settings, tmp_path / "scratch")
    results = [*trained_labels.check(artefacts), *weights.check(artefacts)]
    assert not [(result.id, result.words) for result in results if result.verdict == FAIL]
    judged = {result.id for result in results if result.verdict == PASS}
    assert {"weights.merged", "weights.targets", "weights.untouched", "weights.gguf"} <= judged

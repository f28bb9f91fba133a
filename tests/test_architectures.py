"""The most different architectures of the table of families, small: trained by the names that merge loads, and computed
by llama.cpp as by transformers.

benchmarks/families.py takes each the whole way, minutes each.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import bases

from pipeline.llamacpp.converter import command, convert
from pipeline.llamacpp.gguf_file import check
from pipeline.llamacpp.library import LlamaModel
from pipeline.model.load import load_float32
from pipeline.model.weights_file import read_weights

# Transposed and joined matrices, experts by three routers, latent attention, sinks, a layer without positions.
ARCHITECTURES = ("gpt2", "falcon", "qwen3_moe", "deepseek_v3", "gpt_oss", "smollm3")


def base(model_type: str) -> Path:
    return bases.base(f"architecture-{model_type}", "smollm2-135m-instruct", model_type)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_llama_cpp_computes_what_transformers_does(model_type: str, tmp_path: Path) -> None:
    folder, gguf = base(model_type), tmp_path / "model.gguf"
    convert(command(folder, gguf, "f32"), tmp_path)
    assert check(gguf).parameter_count == read_weights(folder).parameters
    ids = list(range(100, 140))
    with torch.inference_mode():
        ours = load_float32(folder)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    with LlamaModel(gguf, context=64) as served:
        theirs = torch.tensor(served.logits(ids)).log_softmax(-1)
    assert float((ours.exp() * (ours - theirs)).sum(-1).max()) < 1e-4  # a setting that is read otherwise costs 0.01


def test_unsloth_trains_what_merge_loads() -> None:
    """What Unsloth named otherwise, or could not compute, would end a run when its training begins."""
    folders = [str(base(model_type)) for model_type in ARCHITECTURES]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "support.one_step", *folders],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    steps = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(steps) == len(ARCHITECTURES), done.stderr
    for name, step in zip(ARCHITECTURES, steps, strict=True):
        assert step["trained"] == step["merged"], name
        assert len(step["changed"]) == len(step["trained"]), name
        assert all(step["changed"]), name
        # What it computes with in 4 bits is what merge takes for that; of Falcon it leaves everything in 16.
        assert bool(step["unpacked"]) == (name != "falcon"), name
        assert max(step["unpacked"].values(), default=0) < 0.01, name

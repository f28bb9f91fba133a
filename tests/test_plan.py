"""`pipeline plan` on Llama 3.1 8B as a hub has it: of the model nothing but its config.json is there to be fetched."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub import Hub

LLAMA = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096},
    **{"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"max_position_embeddings": 131072},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "hub").mkdir()
    (folder / "hub" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    (folder / "train.csv").write_text("", encoding="utf-8")
    text = '[model]\nbase = "someone/llama"\n[data]\ntrain = "train.csv"\n[export]\nquant = ["q4_k_m"]\n'
    (folder / "pipeline.toml").write_text(text, encoding="utf-8")
    with Hub("someone/llama", folder / "hub") as hub:
        (folder / "address").write_text(hub.address)
        yield folder


def plan(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": (project / "address").read_text(), "HF_HOME": str(project / "home")}
    command = [sys.executable, "-m", "pipeline", "plan", str(project), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def figures(project: Path, *options: str) -> dict[str, Any]:
    answer = plan(project, "--json", *options)
    assert answer.stdout, answer.stderr
    content: dict[str, Any] = json.loads(answer.stdout)
    assert answer.returncode == bool(content["problems"])
    return content


def test_three_cards(project: Path) -> None:
    """With the defaults of each: 24 and 16 GB hold it, 8 GB only with shorter rows."""
    content = figures(project, "--gpu", "24GB", "--memory", "32GB", "--disk", "200GB")
    assert content["problems"] == []
    assert content["shape"]["parameters"] == 8_030_261_248
    assert content["shape"]["modules"]["gate_proj"] == 32
    stages = {row["stage"]: row for row in content["stages"]}
    assert 7e9 < stages["train"]["gpu"] < 12e9  # on the H100 batches of 4,000 and 8,000 tokens took 7.2 and 7.9 GB
    assert stages["merge"]["disk"] == 2 * 8_030_261_248
    assert 4.5e9 < stages["quantize"]["disk"] < 6e9
    assert figures(project, "--gpu", "16GB", "--memory", "32GB", "--disk", "200GB")["problems"] == []

    options = ("--gpu", "8GB", "--memory", "32GB", "--disk", "200GB", "--set", "train.batch=8")
    (problem,) = figures(project, *options)["problems"]
    assert problem.startswith("train: ")
    assert "set train.batch=" in problem
    settings = problem.partition("set ")[2].split(", ")
    again = [word for setting in settings for word in ("--set", setting)]
    assert figures(project, *options, *again)["problems"] == []  # the advice holds


def test_what_a_person_sees(project: Path) -> None:
    answer = plan(project, "--gpu", "4GB", "--memory", "8GB", "--disk", "20GB")
    assert answer.returncode == 1
    for words in (
        *("8,030,261,248 weights", "gate_proj (32)", "128.5 GB and the activations"),
        *("does not fit: train", "take a smaller base or a larger machine", "does not fit: disk"),
    ):
        assert words in answer.stdout, answer.stdout
    assert not list((project / "home").rglob("*.safetensors"))
    answer = plan(project, "--gpu", "large")
    assert answer.returncode == 2
    assert "'large' is no size: write it as 24GB" in answer.stderr

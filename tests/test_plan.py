"""`pipeline plan` on Llama 3.1 8B as a hub has it: of the model nothing but its config.json is there to be fetched."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
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


# The libraries read where the hub is when they are imported, which takes longer than a plan.
PROGRAM = """
import json, sys
from click.testing import CliRunner
from pipeline.cli import main
for arguments in map(json.loads, sys.stdin):
    told = CliRunner().invoke(main, ["plan", *arguments])
    print(json.dumps([told.exit_code, told.stdout, told.stderr]), flush=True)
"""
Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def plan(project: Path) -> Iterator[Plan]:
    """Exit status, output and errors of the command with some options."""
    environment = {**os.environ, "HF_ENDPOINT": (project / "address").read_text(), "HF_HOME": str(project / "home")}
    command, pipe = [sys.executable, "-c", PROGRAM], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:

        def ask(*options: str) -> tuple[int, str, str]:
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps([str(project), *options]), file=process.stdin, flush=True)
            status, output, errors = json.loads(process.stdout.readline())
            return status, output, errors

        yield ask
        assert process.stdin is not None
        process.stdin.close()


def figures(plan: Plan, *options: str) -> dict[str, Any]:
    status, output, errors = plan("--json", *options)
    assert output, errors
    content: dict[str, Any] = json.loads(output)
    assert status == bool(content["problems"])
    return content


def test_three_cards(plan: Plan) -> None:
    """With the defaults of each: 24 and 16 GB hold it, 8 GB only with shorter rows."""
    machine = ("--memory", "32GB", "--disk", "200GB")
    small = ("--gpu", "8GB", *machine, "--set", "train.batch=8")
    content, middle = (figures(plan, "--gpu", size, *machine) for size in ("24GB", "16GB"))
    too_small = figures(plan, *small)
    assert content["problems"] == []
    assert content["shape"]["parameters"] == 8_030_261_248
    assert content["shape"]["modules"]["gate_proj"] == 32
    stages = {row["stage"]: row for row in content["stages"]}
    assert 7e9 < stages["train"]["gpu"] < 12e9  # on the H100 batches of 4,000 and 8,000 tokens took 7.2 and 7.9 GB
    assert stages["merge"]["disk"] == 2 * 8_030_261_248
    assert 4.5e9 < stages["quantize"]["disk"] < 6e9
    assert middle["problems"] == []
    (problem,) = too_small["problems"]
    assert problem.startswith("train: ")
    assert "set train.batch=" in problem
    settings = problem.partition("set ")[2].split(", ")
    again = [word for setting in settings for word in ("--set", setting)]
    assert figures(plan, *small, *again)["problems"] == []  # the advice holds


def test_what_a_person_sees(plan: Plan, project: Path) -> None:
    status, shown, _ = plan("--gpu", "4GB", "--memory", "8GB", "--disk", "20GB")
    mistaken, _, said = plan("--gpu", "large")
    assert status == 1
    for words in (
        *("8,030,261,248 weights", "gate_proj (32)", "128.5 GB and the activations"),
        *("does not fit: train", "take a smaller base or a larger machine", "does not fit: disk"),
    ):
        assert words in shown, shown
    assert not list((project / "home").rglob("*.safetensors"))
    assert mistaken == 2
    assert "'large' is no size: write it as 24GB" in said

"""`pipeline plan` on Llama 3.1 8B as a hub has it: of the model nothing but its config.json is there to be fetched."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
for arguments in json.loads(sys.argv[1]):
    told = CliRunner().invoke(main, ["plan", *arguments])
    print(json.dumps([told.exit_code, told.stdout, told.stderr]))
"""


def plans(project: Path, *options: Sequence[str]) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of the command with each of these options, one after the other."""
    environment = {**os.environ, "HF_ENDPOINT": (project / "address").read_text(), "HF_HOME": str(project / "home")}
    arguments = json.dumps([[str(project), *given] for given in options])
    command = [sys.executable, "-c", PROGRAM, arguments]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in answer.stdout.splitlines()]


def figures(project: Path, *options: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for status, output, errors in plans(project, *(["--json", *given] for given in options)):
        assert output, errors
        content: dict[str, Any] = json.loads(output)
        assert status == bool(content["problems"])
        found.append(content)
    return found


def test_three_cards(project: Path) -> None:
    """With the defaults of each: 24 and 16 GB hold it, 8 GB only with shorter rows."""
    machine = ("--memory", "32GB", "--disk", "200GB")
    small = ("--gpu", "8GB", *machine, "--set", "train.batch=8")
    content, middle, too_small = figures(project, ("--gpu", "24GB", *machine), ("--gpu", "16GB", *machine), small)
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
    assert figures(project, [*small, *again])[0]["problems"] == []  # the advice holds


def test_what_a_person_sees(project: Path) -> None:
    tiny = ("--gpu", "4GB", "--memory", "8GB", "--disk", "20GB")
    (status, shown, _), (mistaken, _, said) = plans(project, tiny, ("--gpu", "large"))
    assert status == 1
    for words in (
        *("8,030,261,248 weights", "gate_proj (32)", "128.5 GB and the activations"),
        *("does not fit: train", "take a smaller base or a larger machine", "does not fit: disk"),
    ):
        assert words in shown, shown
    assert not list((project / "home").rglob("*.safetensors"))
    assert mistaken == 2
    assert "'large' is no size: write it as 24GB" in said

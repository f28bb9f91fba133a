"""What would fail after hours of training fails before it: bases, templates, servers and machines that cannot do it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import servers
from good_run import conversations, good_run, write_rows

from pipeline.config import load_config
from pipeline.verify import machine
from pipeline.verify.preflight import failures, preflight
from pipeline.verify.result import FAIL, NOT_RUN, PASS


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small base that a test may break, rows, and a configuration."""
    shutil.copytree(good_run() / "base", tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", conversations(3, 8))
    (tmp_path / "pipeline.toml").write_text('[model]\nbase = "base"\n[data]\ntrain = "train.jsonl"\n')
    return tmp_path


def look(project: Path, *overrides: str) -> dict[str, Any]:
    """preflight.json of a project."""
    settings, _ = load_config(project / "pipeline.toml", overrides)
    scratch = project / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return preflight(settings, project / "run", scratch)


def test_a_good_base_goes_the_whole_way(project: Path) -> None:
    content = look(project, "export.quant=['q4_k_m', 'q8_0']")
    assert content["verdict"] == PASS, failures(content)
    passed = {(row["id"], row["rung"]) for row in content["checks"] if row["verdict"] == PASS}
    assert passed >= {
        *(("machine.disk", "base"), ("machine.memory", "base"), ("machine.versions", "base")),
        *(("weights.reload", "base"), ("weights.finite", "base"), ("toolchain.pin", "convert")),
        *(("preflight.convert", "convert"), ("preflight.template", "modelfile"), ("preflight.served", "deploy")),
        *(("tokenizer.ids", "convert"), ("tokenizer.ids", "quantize/q8_0"), ("prompt.llamacpp", "quantize/q4_k_m")),
        *(("logits.mean", "convert"), ("logits.quantized", "quantize/q8_0"), ("quantization.types", "quantize/q4_k_m")),
    }


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def unknown_architecture(base: Path) -> None:
    change_json(base / "config.json", architectures=["NobodyForCausalLM"])


def unknown_splitting(base: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


def template_that_llamacpp_renders_otherwise(base: Path) -> None:
    """It upper-cases what the user says, which no Go template can, and asks the date, which is frozen nowhere."""
    (base / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %B %Y %H:%M:%S') }}{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content | upper }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def one_nan(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def a_layer_is_missing(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1.mlp.up_proj" not in name}
    save_file(kept, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "check", "rung", "said"),
    [
        (unknown_architecture, "preflight.convert", "convert", "NobodyForCausalLM"),
        (unknown_splitting, "preflight.convert", "convert", "pre-tokenizer"),
        (template_that_llamacpp_renders_otherwise, "preflight.template", "modelfile", "cannot be served exactly"),
        (one_nan, "weights.finite", "base", "up_proj"),
        (a_layer_is_missing, "weights.reload", "base", "up_proj"),
    ],
)
def test_a_base_that_would_fail(project: Path, damage: Any, check: str, rung: str, said: str) -> None:
    damage(project / "base")
    content = look(project)
    assert content["verdict"] == FAIL
    (row,) = [row for row in content["checks"] if row["verdict"] == FAIL and row["id"] == check]
    assert row["rung"] == rung
    assert said in row["words"]


def test_a_name_that_is_taken(project: Path) -> None:
    from pipeline.ollama.scratch import write_scratch_model

    client, host = servers.client(), servers.ollama().host
    digest = client.upload(write_scratch_model(project / "other.gguf"))
    client.create("taken:latest", {"files": {"other.gguf": digest}})
    given = (f"ollama.host={host}", "ollama.name=taken")
    assert any("taken:latest" in line for line in failures(look(project, *given)))
    assert look(project, *given, "ollama.replace=true")["verdict"] == PASS
    client.delete("taken:latest")


def test_a_server_that_is_down(project: Path) -> None:
    (line,) = failures(look(project, "ollama.host=127.0.0.1:9"))
    assert line.startswith("deploy: ")
    assert "127.0.0.1:9" in line


def test_a_machine_that_is_too_small(project: Path) -> None:
    config, _ = load_config(project / "pipeline.toml", ["export.quant=['q4_k_m', 'q8_0']"])
    run = project / "not" / "there" / "yet"
    results = {result.id: result for result in machine.check(config, run, 10**15, 8 * 2**30)}
    assert {id for id, result in results.items() if result.verdict == FAIL} == {
        *("machine.disk", "machine.memory", "machine.gpu")
    }
    for stage in ("merge", "convert", "quantize", "deploy", "verify"):
        assert stage in results["machine.disk"].words
    assert results["machine.float32"].verdict == NOT_RUN
    small = {result.id: result.verdict for result in machine.check(config, run, 10**6, 8 * 2**30)}
    assert set(small.values()) == {PASS}
    needs = machine.disk_needs(config, 10**9)
    assert needs["merge"] == needs["convert"] == 2 * 10**9
    assert needs["quantize"] > 10**9 * (4.9 + 8.5) / 8


def test_a_run_stops_before_it_trains(project: Path) -> None:
    unknown_architecture(project / "base")
    command = [sys.executable, "-m", "pipeline", "run", project]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "NobodyForCausalLM" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (project / "run" / "data").exists()
    assert not (project / "run" / "preflight").exists()

"""What would fail after hours of training fails before it: bases, templates, servers and machines that cannot do it.

That a good base goes the whole way is seen in the end-to-end run.
"""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import servers, small_models
from support.adapters import peft_adapter
from support.commands import pipeline
from support.good_run import conversations, good_run, write_rows

from pipeline import stages
from pipeline.errors import PipelineError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.model.weights_file import Weights
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.toml_file import load_config
from pipeline.verify import machine_needs
from pipeline.verify.chain import run_check
from pipeline.verify.reconvert import reconvert
from pipeline.verify.result import FAIL, NOT_RUN, PASS
from pipeline.verify.untouched_base import check_adapters, check_target, preflight

MATRIX = "model.layers.0.mlp.up_proj.weight"


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
    return preflight(settings, project / "run", scratch, stages.judged_stages())


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
    """It calls a method of Python's strings that no other engine has."""
    (base / "chat_template.jinja").write_text(
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content.swapcase() }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def one_nan(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def a_layer_is_missing(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1.mlp.up_proj" not in name}
    save_file(kept, base / "model.safetensors", {"format": "pt"})


def test_every_failure_is_named_at_once(project: Path) -> None:
    for damage in (template_that_llamacpp_renders_otherwise, one_nan, a_layer_is_missing):
        damage(project / "base")
    content = look(project)
    assert content["verdict"] == FAIL
    failed = {(row["id"], row["stage"]): row["words"] for row in content["checks"] if row["verdict"] == FAIL}
    assert "cannot be served exactly" in failed["preflight.template", "modelfile"]
    assert "down_proj" in failed["weights.finite", "base"]
    assert "up_proj" in failed["weights.reload", "base"]


def target(project: Path, *overrides: str) -> tuple[str, str]:
    """What preflight says of the server and of the names there: the verdict, and why."""
    settings, _ = load_config(project / "pipeline.toml", overrides)
    check = partial(check_target, settings, project / "run", project)
    (result,) = run_check("preflight.target", "deploy", check)
    return result.verdict, result.words


def test_a_name_that_is_taken(project: Path) -> None:
    client, host = servers.client(), servers.ollama().host
    digest = client.upload(write_scratch_model(project / "other.gguf"))
    client.create("taken:latest", {"files": {"other.gguf": digest}})
    given = (f"ollama.host={host}", "ollama.name=taken")
    verdict, words = target(project, *given)
    assert verdict == FAIL
    assert "taken:latest" in words
    assert target(project, *given, "ollama.replace=true")[0] == PASS
    assert target(project, f"ollama.host={host}", "ollama.name=free")[0] == PASS
    client.delete("taken:latest")


def test_a_server_that_is_down(project: Path) -> None:
    verdict, words = target(project, "ollama.host=127.0.0.1:9")
    assert verdict == FAIL
    assert "127.0.0.1:9" in words


def test_a_machine_that_is_too_small(project: Path) -> None:
    config, _ = load_config(project / "pipeline.toml", ["export.quant=['q4_k_m', 'q8_0']"])
    run = project / "not" / "there" / "yet"

    def weights(rows: int) -> Weights:
        return Weights(small_models.base_folder(), [], shapes={MATRIX: (rows, 10**4)}, types={MATRIX: "BF16"})

    results = {result.id: result for result in machine_needs.check(config, run, weights(10**11), 8 * 2**30)}
    assert {id for id, result in results.items() if result.verdict == FAIL} == {
        *("machine.disk", "machine.memory", "machine.gpu")
    }
    for stage in ("merge", "convert", "quantize", "deploy", "verify"):
        assert stage in results["machine.disk"].words
    assert results["machine.float32"].verdict == NOT_RUN
    small = {result.id: result.verdict for result in machine_needs.check(config, run, weights(100), 8 * 2**30)}
    assert set(small.values()) == {PASS}
    without = {result.id: result for result in machine_needs.check(config, run, weights(10**11), None)}
    assert without["machine.training"].verdict == FAIL
    assert "machine.gpu" not in without
    needs = machine_needs.disk_needs(config, 10**9)
    assert needs["merge"] == needs["convert"] == 2 * 10**9
    assert needs["quantize"] > 10**9 * (4.9 + 8.5) / 8
    apart, _ = load_config(project / "pipeline.toml", ['export.as="adapter"'])
    assert machine_needs.disk_needs(apart, 10**9)["verify"] == needs["verify"] + 2 * 10**9
    hosts = {"127.0.0.1:11434": True, "http://localhost:9": True, "[::1]:9": True, "10.0.0.2": False}
    for host, there in hosts.items():
        other, _ = load_config(project / "pipeline.toml", [f"ollama.host={host!r}"])
        assert bool(machine_needs.disk_needs(other, 10**9)["deploy"]) == there


def test_an_adapter_that_is_served_apart_is_converted_before_it_is_trained(project: Path, tmp_path: Path) -> None:
    """One of the modules that will be trained, or the one that is given; each matrix has its place in the base."""
    base = project / "base"
    converted = reconvert(base, project, "f16")
    config, _ = load_config(project / "pipeline.toml", ['export.as="adapter"'])
    (tmp_path / "scratch").mkdir()
    (result,) = check_adapters(config, base, converted, tmp_path / "scratch")
    assert result.verdict == PASS
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    assert len(inspect(tmp_path / "scratch" / "adapter-0.gguf").tensors) == 2 * 7 * layers

    adapter = peft_adapter(tmp_path / "given", base, target_modules=["q_proj"], use_rslora=True)
    given = small_models.make_config(
        model=config.model, adapter={"path": adapter}, data={"train": None}, export=config.export
    )
    (tmp_path / "again").mkdir()
    less = replace(converted, tensors=[tensor for tensor in converted.tensors if "blk.1.attn_q" not in tensor.name])
    with pytest.raises(PipelineError, match=r"blk\.1\.attn_q\.weight is not there in"):
        next(check_adapters(given, base, less, tmp_path / "again"))


def test_a_run_stops_before_it_trains(project: Path) -> None:
    """Here for a tokenizer that llama.cpp's converter does not know."""
    unknown_splitting(project / "base")
    answer = pipeline("run", project)
    assert answer.exit_code == 2
    assert "convert: " in answer.stderr
    assert "does not know how this tokenizer splits text" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (project / "run" / "data").exists()
    assert not (project / "run" / "preflight").exists()

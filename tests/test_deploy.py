"""Deploying to the real Ollama: what is left under the name, what is refused, and what is said without an Ollama."""

import json
import shutil
from pathlib import Path
from typing import Any

import artefacts
import pytest
import servers

from pipeline.errors import PipelineError, UserError
from pipeline.ollama.client import Client
from pipeline.ollama.server import OllamaServer
from pipeline.ollama.target import names_of
from pipeline.stages import deploy, modelfile
from pipeline.work import Work

ROW = {
    "messages": [
        {"role": "user", "content": "What is the capital of France? Answer in one word."},
        {"role": "assistant", "content": "Paris"},
    ]
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to `modelfile`: the untouched base as Q4_K_M."""
    artefacts.quantized()
    folder = tmp_path_factory.mktemp("deploy")
    for stage in ("merge", "quantize"):
        shutil.copytree(artefacts.base_run() / stage, folder / stage, symlinks=True)
    (folder / "data").mkdir()
    (folder / "data" / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    modelfile.main(work(folder, "modelfile", "q4_k_m"))
    return folder


def work(folder: Path, stage: str = "deploy", variant: str = "", **ollama: Any) -> Work:
    sections: dict[str, Any] = {
        "ollama": {"name": "deployed", "parameters": {"temperature": 0}, **ollama},
        "eval": {"metric": "text", "max_new_tokens": 24},
        "train": {"max_length": 64},
    }
    made = artefacts.make_work(folder, stage, variant, **sections)
    if stage == "deploy":  # as the graph does it: a folder of its own, renamed when the stage is done
        output = folder / ".partial"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        return Work(made.config, folder, output, variant, folder / "scratch", stage)
    return made


def publish(made: Work) -> dict[str, Any]:
    target = made.run / "deploy"
    shutil.rmtree(target, ignore_errors=True)
    made.output.rename(target)
    return dict(json.loads((target / "deploy.json").read_text()))


def test_to_a_running_ollama(run: Path) -> None:
    client = servers.client()
    made = work(run, host=servers.ollama().host)
    figures = deploy.main(made)
    record = publish(made)
    assert figures["deployed"]
    assert not figures["own_server"]
    assert record["host"] == servers.ollama().host
    (model,) = record["models"]
    assert model["way"] == "go"
    assert model["digest"] == client.names()["deployed:latest"]
    assert model["prompts"]["token_ids_equal"] >= 50
    assert model["shown"]["parameters"]["temperature"] == [0]
    (answer,) = model["answers"]
    assert "Paris" in answer["answer"]
    assert answer["stopped"]
    assert not [name for name in client.names() if name.startswith("pipeline-proof")]

    # The run's own model is replaced without asking; another's is not.
    deploy.main(made := work(run, host=servers.ollama().host))
    publish(made)
    stranger = "stranger:latest"
    client.create(stranger, {"from": "deployed:latest", "system": "I was here first."})
    digest = client.names()[stranger]
    with pytest.raises(UserError, match="--replace"):
        deploy.main(work(run, host=servers.ollama().host, name="stranger"))
    assert client.names()[stranger] == digest
    deploy.main(work(run, host=servers.ollama().host, name="stranger", replace=True))
    assert client.show(stranger).get("system", "") == ""
    client.delete(stranger)


def test_what_cannot_be_proven_leaves_the_old_model_and_no_half_made_one(run: Path, tmp_path: Path) -> None:
    client = servers.client()
    servers.engine()
    client.create("deployed:latest", {"from": "scratch-go:latest", "system": "old"})
    before = client.names()["deployed:latest"]
    broken = tmp_path / "run"
    shutil.copytree(run, broken, symlinks=True)
    plan = json.loads((broken / "modelfile" / "q4_k_m" / "create.json").read_text())
    plan["request"]["template"] = plan["request"]["template"].replace("You are a helpful", "You are an")
    (broken / "modelfile" / "q4_k_m" / "create.json").write_text(json.dumps(plan))
    with pytest.raises(PipelineError, match="Ollama sends other prompts") as error:
        deploy.main(work(broken, host=servers.ollama().host, replace=True))
    assert "- You are a helpful" in str(error.value)
    assert client.names()["deployed:latest"] == before
    assert not [name for name in client.names() if name.startswith("pipeline-proof")]


def test_a_model_that_never_stops_is_not_deployed(run: Path, tmp_path: Path) -> None:
    endless = tmp_path / "run"
    shutil.copytree(run, endless, symlinks=True)
    row = {"messages": [{"role": "user", "content": "Count from 1 to 1000."}, {"role": "assistant", "content": "1"}]}
    (endless / "data" / "test.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(PipelineError, match="never stops by itself"):
        deploy.main(work(endless, host=servers.ollama().host, name="endless"))
    assert "endless:latest" not in servers.client().names()


def test_in_a_server_of_its_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")  # nothing is running
    made = work(run)
    figures = deploy.main(made)
    record = publish(made)
    assert figures["own_server"]
    assert record["models"][0]["selected"] == "go_template"
    with OllamaServer(run / record["models_folder"]) as server, Client(server.host) as client:
        assert client.names()["deployed:latest"] == record["models"][0]["digest"]
        assert set(client.names()) == {"deployed:latest"}


def test_a_host_that_is_down_or_none(run: Path) -> None:
    with pytest.raises(UserError, match="no Ollama answers at http://127.0.0.1:1 "):
        deploy.main(work(run, host="127.0.0.1:1"))
    with pytest.raises(UserError, match="not an address"):
        deploy.main(work(run, host="ftp://x"))


def test_no_ollama_at_all_is_said_and_no_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    monkeypatch.setattr("pipeline.ollama.target.find_ollama", lambda: None)
    made = work(run)
    figures = deploy.main(made)
    assert not figures["deployed"]
    assert figures["commands"][0].endswith("&& ollama create deployed:latest -f Modelfile")
    assert figures["commands"][1] == "ollama run deployed:latest"
    assert any("not deployed" in warning for warning in made.warnings)
    assert not publish(made)["deployed"]


def test_a_dry_run_creates_nothing(run: Path) -> None:
    before = servers.client().names()
    lines = deploy.plan(work(run, host=servers.ollama().host).config, run)
    assert "server: Ollama" in lines[0]
    assert any("create: deployed:latest" in line and "TEMPLATE" in line for line in lines)
    assert servers.client().names() == before


@pytest.mark.parametrize("name", ["a b", "../x", "a\nSYSTEM b", ""])
def test_a_name_that_ollama_would_not_take(name: str) -> None:
    if name:
        with pytest.raises(UserError, match="not a name"):
            names_of(name, ["q4_k_m"])
    else:
        assert names_of(name, ["q4_k_m"]) == {"q4_k_m": "model:latest"}


def test_several_types_have_names_of_their_own() -> None:
    assert names_of("me/home", ["q4_k_m", "q8_0"]) == {"q4_k_m": "me/home:latest", "q8_0": "me/home:q8_0"}


def test_the_modelfile_beside_it_makes_the_same_model(run: Path) -> None:
    """What a person types leads to the same template, parameters and text."""
    import os
    import subprocess

    from pipeline.ollama.proof import read_back
    from pipeline.ollama.server import find_ollama

    folder = run / "modelfile" / "q4_k_m"
    served, _ = deploy._plan(folder)
    program = find_ollama()
    assert program is not None
    environment = {**os.environ, "OLLAMA_HOST": servers.ollama().host, "HOME": str(run)}
    subprocess.run(
        [program, "create", "typed", "-f", "Modelfile"], cwd=folder, env=environment, check=True, capture_output=True
    )
    read_back(servers.client(), "typed:latest", served, served.template)
    servers.client().delete("typed:latest")


def test_a_default_system_text_is_served_and_proven(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder, symlinks=True)
    modelfile.main(work(folder, "modelfile", "q4_k_m", system='Answer like a pirate.\n"""\nArr.'))
    made = work(folder, host=servers.ollama().host, name="pirate", system='Answer like a pirate.\n"""\nArr.')
    deploy.main(made)
    assert servers.client().show("pirate:latest")["system"] == 'Answer like a pirate.\n"""\nArr.'
    servers.client().delete("pirate:latest")

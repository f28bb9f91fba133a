"""Deploying to the real Ollama: what is left under the name, what is refused, and what is said without an Ollama."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import servers, small_models
from support.commands import pipeline
from support.good_run import config_of
from support.proxy import make_certificate, proxy

from pipeline.cli import resolved
from pipeline.errors import PipelineError, UserError
from pipeline.ollama.client import Client
from pipeline.ollama.deployment import (
    deployed,
    differences,
    planned,
    proof_name,
    read_back,
    template_in_force,
    template_selected,
)
from pipeline.ollama.ollama_server import OllamaServer
from pipeline.ollama.target import local_store, names_of, refuse_taken
from pipeline.prompt.conformance import COMPARED
from pipeline.run.folder import record_files, write_manifest
from pipeline.run.graph import Graph
from pipeline.run.layout import Layout
from pipeline.run.stage import Task
from pipeline.stages import all_stages, deploy, modelfile


def row(question: str, answer: str) -> str:
    """A line of the data."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


ROW = row("What is the capital of France? Answer in one word.", "Paris")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to `modelfile`: the untouched base as Q4_K_M."""
    small_models.quantized()
    folder = tmp_path_factory.mktemp("deploy")
    for stage in ("merge", "quantize"):
        shutil.copytree(small_models.base_run() / stage, folder / stage, symlinks=True)
    (folder / "data").mkdir()
    (folder / "data" / "test.jsonl").write_text(ROW)
    (folder / "data" / "data.json").write_text('{"context_needed": 64}')
    modelfile.main(task(folder, "modelfile", "q4_k_m"))
    return folder


def task(
    folder: Path, stage: str = "deploy", variant: str = "", sections: dict[str, Any] | None = None, **ollama: Any
) -> Task:
    values: dict[str, Any] = {
        "ollama": {"name": "deployed", "parameters": {"temperature": 0}, **ollama},
        "eval": {"metric": "text", "max_new_tokens": 24},
        "train": {"max_length": 64},
        **(sections or {}),
    }
    made = small_models.make_task(folder, stage, variant, **values)
    if stage == "deploy":  # as the graph does it: a folder of its own, renamed when the stage is done
        output = folder / ".partial"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        return replace(made, output=output)
    return made


def publish(made: Task) -> dict[str, Any]:
    target = made.run / "deploy"
    shutil.rmtree(target, ignore_errors=True)
    made.output.rename(target)
    return dict(json.loads((target / "deploy.json").read_text()))


def copied(run: Path, folder: Path) -> Path:
    """A run's folder to change, from which nothing was deployed yet."""
    shutil.copytree(
        run, folder, symlinks=True, ignore=shutil.ignore_patterns("deploy", "ollama-published.json", "ollama")
    )
    return folder


def change_plan(folder: Path, old: str, new: str, variant: str = "q4_k_m") -> None:
    """Replace a text of the template in create.json."""
    path = folder / "modelfile" / variant / "create.json"
    plan = json.loads(path.read_text())
    assert old in plan["request"]["template"]
    plan["request"]["template"] = plan["request"]["template"].replace(old, new)
    path.write_text(json.dumps(plan))


def proofs() -> list[str]:
    """What is left of proofs."""
    return [name for name in servers.client().names() if name.startswith("pipeline-proof")]


def test_to_a_running_ollama(run: Path) -> None:
    client = servers.client()
    made = task(run, host=servers.ollama().host)
    figures = deploy.main(made)
    record = publish(made)
    assert figures["deployed"]
    assert not figures["own_server"]
    assert record["host"] == servers.ollama().host
    (model,) = record["models"]
    assert model["way"] == "go"
    assert model["digest"] == client.names()["deployed:latest"]
    compared = sum(status in COMPARED for status in model["prompts"]["outcomes"].values())
    assert model["prompts"]["token_ids_equal"] == compared >= 50
    assert model["prompts"]["other_token_ids"] == {}
    assert model["shown"]["parameters"]["temperature"] == [0]
    (answer,) = model["answers"]
    assert "Paris" in answer["answer"]
    assert answer["stopped"]
    assert not proofs()

    # The run's own model is replaced without asking; another's is not, also if its name is spelled otherwise.
    deploy.main(made := task(run, host=servers.ollama().host))
    publish(made)
    stranger = "Stranger:latest"
    client.create(stranger, {"from": "deployed:latest", "system": "I was here first."})
    digest = client.names()[stranger]
    with pytest.raises(UserError, match="--replace"):
        deploy.main(task(run, host=servers.ollama().host, name="stranger"))
    assert client.names()[stranger] == digest
    assert "stranger:latest, which is there already" in "".join(
        deploy.preview(task(run, host=servers.ollama().host, name="library/stranger").config, run)
    )
    made = task(run, host=servers.ollama().host, name="stranger", replace=True)
    deploy.main(made)
    assert client.show(stranger).get("system", "") == ""
    (model,) = json.loads((made.output / "deploy.json").read_text())["models"]
    assert client.names()[stranger] == model["digest"]
    client.delete(stranger)


def test_a_taken_name_is_taken_in_every_spelling(tmp_path: Path) -> None:
    servers.engine()
    client = servers.client()
    client.create("Taken:One", {"from": "scratch-go:latest", "system": "mine"})
    for name in ("taken:one", "TAKEN:ONE", "library/taken:one", "registry.ollama.ai/library/Taken:one"):
        assert client.show(name)["system"] == "mine"  # so says Ollama itself
        with pytest.raises(UserError, match="--replace"):
            refuse_taken(client, name, Layout(tmp_path), replace=False)
        refuse_taken(client, name, Layout(tmp_path), replace=True)
    for name in ("taken", "taken:two", "me/taken:one", "example.com/library/taken:one"):
        with pytest.raises(PipelineError, match="not found"):
            client.show(name)
        refuse_taken(client, name, Layout(tmp_path), replace=False)
    client.delete("taken:one")


def test_what_cannot_be_proven_leaves_the_old_model_and_no_half_made_one(run: Path, tmp_path: Path) -> None:
    client = servers.client()
    servers.engine()
    client.create("deployed:latest", {"from": "scratch-go:latest", "system": "old"})
    before = client.names()["deployed:latest"]
    broken = copied(run, tmp_path / "run")
    change_plan(broken, "You are a helpful", "You are an")
    with pytest.raises(PipelineError, match="Ollama sends other prompts") as error:
        deploy.main(task(broken, host=servers.ollama().host, replace=True))
    assert "- You are a helpful" in str(error.value)
    assert client.names()["deployed:latest"] == before
    assert not proofs()


def test_nothing_is_published_before_every_type_is_proven(run: Path, tmp_path: Path) -> None:
    client = servers.client()
    servers.engine()
    client.create("both:latest", {"from": "scratch-go:latest", "system": "old"})
    before = client.names()["both:latest"]
    folder = copied(run, tmp_path / "run")
    (folder / "data" / "test.jsonl").unlink()
    shutil.copytree(folder / "modelfile" / "q4_k_m", folder / "modelfile" / "q8_0")
    change_plan(folder, "You are a helpful", "You are an", "q8_0")
    types = {"export": {"quant": ["q4_k_m", "q8_0"]}}
    host = servers.ollama().host
    with pytest.raises(PipelineError, match="Ollama sends other prompts"):
        deploy.main(task(folder, sections=types, host=host, name="both", replace=True))
    assert client.names()["both:latest"] == before
    assert client.digest("both:q8_0") is None
    assert not proofs()

    change_plan(folder, "You are an", "You are a helpful", "q8_0")
    client.create("Both:q8_0", {"from": "scratch-go:latest", "system": "old"})
    with pytest.raises(UserError, match=r"both:q8_0.*--replace"):
        Layout(folder).published.write_text(json.dumps({"both:latest": [before]}))  # only the second is another's
        deploy.main(task(folder, sections=types, host=host, name="both"))
    assert client.names()["both:latest"] == before
    made = task(folder, sections=types, host=host, name="both", replace=True)
    deploy.main(made)
    for model in publish(made)["models"]:
        assert client.digest(model["name"]) == model["digest"] != before
        client.delete(model["name"])
    assert any("nothing was asked" in warning for warning in made.warnings)


def test_after_a_kill_the_same_command_knows_its_own_model(run: Path, tmp_path: Path) -> None:
    client, host = servers.client(), servers.ollama().host
    folder = copied(run, tmp_path / "run")
    (folder / "data" / "test.jsonl").unlink()
    program = (
        "import sys, test_deploy; from pathlib import Path; from pipeline.stages import deploy\n"
        "deploy.main(test_deploy.task(Path(sys.argv[1]), host=sys.argv[2], name='killed'))"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [here, *here.parents[:2]]))}
    process = subprocess.Popen([sys.executable, "-c", program, str(folder), host], env=environment)
    while not Layout(folder).published.exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    # The signal came before the copy or after it: here it came between the copy and all that follows.
    proof = f"{proof_name(folder)}:q4_k_m"
    if client.digest("killed") is None:
        client.copy(proof, "killed")
    if client.digest(proof) is None:
        client.copy("killed", proof)

    deploy.main(task(folder, host=host, name="killed"))
    assert not proofs()
    Layout(folder).published.unlink()
    with pytest.raises(UserError, match="--replace"):  # it is the journal that knew
        deploy.main(task(folder, host=host, name="killed"))
    client.delete("killed")


def test_a_model_that_mostly_does_not_stop_is_not_deployed(run: Path, tmp_path: Path) -> None:
    endless = copied(run, tmp_path / "run")
    (endless / "data" / "test.jsonl").write_text(ROW + row("Count from 1 to 1000.", "1"))
    with pytest.raises(PipelineError, match="does not stop by itself: 1 of 2 answers"):
        deploy.main(task(endless, host=servers.ollama().host, name="endless"))
    assert "endless:latest" not in servers.client().names()


def test_a_tools_name_reaches_the_template(tmp_path: Path) -> None:
    servers.engine()
    client = servers.client()
    shown = "{{ range .Messages }}{{ .ToolName }}{{ end }}"
    client.create("tools:latest", {"from": "scratch-go:latest", "template": shown})
    turns = [
        {"role": "tool", "name": "x" * 40, "content": "9"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "!"},
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    ((answer,), _) = deploy.ask(task(tmp_path, sections={"verify": {"stopping": 0}}), client, "tools:latest", ())
    assert answer["prompt_tokens"] >= 40
    client.unload("tools:latest")
    client.delete("tools:latest")


def test_rows_with_tools_are_asked_where_ollama_takes_them(tmp_path: Path) -> None:
    """A template without tools makes Ollama refuse them: then nothing is asked, and that is no failure."""
    servers.engine()
    client = servers.client()
    tool = {"type": "function", "function": {"name": "lamp", "description": "x", "parameters": {"type": "object"}}}
    (tmp_path / "data").mkdir()
    asked = json.loads(ROW) | {"tools": [tool]}
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(asked) + "\n")
    takes = "{{ range .Messages }}{{ .Content }}{{ end }}{{ range .Tools }}{{ .Function.Name }}{{ end }}"
    for template, tools in (("{{ range .Messages }}{{ .Content }}{{ end }}", False), (takes, True)):
        client.create("tools:latest", {"from": "scratch-go:latest", "template": template})
        capabilities = client.show("tools")["capabilities"]
        assert ("tools" in capabilities) == tools
        made = task(tmp_path, sections={"verify": {"stopping": 0}})
        answers, _ = deploy.ask(made, client, "tools:latest", capabilities)
        assert [answer["right"] for answer in answers] == [None] * tools  # calls are not in an answer's text
        assert any("nothing was asked: the rows have tools" in warning for warning in made.warnings) != tools
        client.unload("tools:latest")
        client.delete("tools:latest")


@pytest.fixture
def nothing_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.setattr("pipeline.ollama.address.DEFAULT_HOST", "http://127.0.0.1:1")


@pytest.mark.usefixtures("nothing_is_running")
def test_in_a_server_of_its_own(run: Path) -> None:
    made = task(run)
    figures = deploy.main(made)
    record = publish(made)
    assert figures["own_server"]
    assert record["models"][0]["selected"] == "go_template"
    with OllamaServer(run / record["models_folder"]) as server, Client(server.host) as client:
        assert client.names()["deployed:latest"] == record["models"][0]["digest"]
        assert set(client.names()) == {"deployed:latest"}


@pytest.mark.usefixtures("nothing_is_running")
def test_the_native_way(tmp_path: Path) -> None:
    folder = copied(servers.family_run("qwen3"), tmp_path / "run")
    types = {"export": {"quant": ["q8_0"]}}
    modelfile.main(task(folder, "modelfile", "q8_0", sections=types))
    made = task(folder, sections=types)
    deploy.main(made)
    (model,) = publish(made)["models"]
    assert (model["way"], model["selected"]) == ("native", "gguf_chat_template")

    log, name = folder / "deploy" / "ollama.log", f"{proof_name(folder)}:q8_0"
    with pytest.raises(PipelineError, match="by gguf_chat_template instead of go_template"):
        template_selected(log, name, "go")
    assert template_selected(log, "another:q8_0", "go") is None
    assert template_selected(None, name, "go") is None


def test_a_host_that_is_down_or_none(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"no Ollama answers at http://127.0.0.1:1 .*Without ollama\.host one is started"
    ):
        deploy.main(task(run, host="127.0.0.1:1"))
    with pytest.raises(UserError, match=r"ollama\.host = 'ftp://x': not an address"):
        deploy.main(task(run, host="ftp://x"))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")  # and no other is taken instead
    for ask in (lambda: deploy.main(task(run)), lambda: deploy.preview(task(run).config, run)):
        with pytest.raises(UserError, match=r"no Ollama answers at http://127\.0\.0\.1:1 "):
            ask()
    monkeypatch.setenv("OLLAMA_HOST", "ftp://x")
    with pytest.raises(UserError, match="OLLAMA_HOST = 'ftp://x': not an address"):
        deploy.main(task(run))
    with pytest.raises(UserError, match="OLLAMA_HOST = 'ftp://x': not an address"):
        deploy.preview(task(run).config, run)


def test_through_a_proxy_with_a_password_and_nothing_of_it_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below a path, over https with a certificate of one's own."""
    folder = copied(run, tmp_path / "run")
    certificate = make_certificate(tmp_path / "own.pem", "IP:127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with proxy(servers.ollama().host, prefix="/ollama", login="me:hush", certificate=certificate) as host:
        monkeypatch.setenv("OLLAMA_HOST", host.replace("//", "//me:hush@") + "/ollama")
        deploy.main(made := task(folder, name="proxied"))
        record = publish(made)
        assert record["host"] == f"{host}/ollama"
        with deployed(folder) as served:
            assert served is not None
        told = pipeline("deploy", tmp_path, "--host", host.replace("//", "//me:hush@"))
        assert told.exit_code == 2
        monkeypatch.setenv("OLLAMA_HOST", host.replace("//", "//me:hushed@") + "/ollama")
        with pytest.raises(UserError, match="HTTP status 401") as error:
            deploy.main(task(folder, name="proxied"))
    assert "hush" not in "".join(capsys.readouterr()) + told.output + str(error.value)
    for file in folder.rglob("*"):
        assert not file.is_file() or file.suffix in (".gguf", ".safetensors") or b"hush" not in file.read_bytes(), file
    servers.client().delete("proxied:latest")


def test_through_a_proxy_that_takes_no_large_file(run: Path, tmp_path: Path) -> None:
    with (
        OllamaServer(tmp_path / "models") as server,
        proxy(server.host, limit=1 << 20) as host,
        Client(server.host) as client,
    ):
        with pytest.raises(
            PipelineError, match=r"model-q4_k_m\.gguf was not taken .* status 413 .*client_max_body_size"
        ):
            deploy.main(task(run, name="large", host=host))
        assert not client.names()


@pytest.mark.usefixtures("nothing_is_running")
def test_no_ollama_at_all_is_said_and_no_error(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.ollama.target.find_ollama", lambda: None)
    made = task(run)
    figures = deploy.main(made)
    assert not figures["deployed"]
    assert figures["commands"][0].endswith("&& ollama create deployed:latest -f Modelfile")
    assert figures["commands"][1] == "ollama run deployed:latest"
    assert any("not deployed" in warning for warning in made.warnings)
    assert deploy.unfinished(figures)
    assert not publish(made)["deployed"]

    folder = copied(run, tmp_path / "run")
    (folder / "modelfile" / "q4_k_m" / "Modelfile").unlink()
    (command,) = deploy.main(task(folder))["commands"]
    assert command.startswith("pipeline deploy")


def test_the_commands_options_and_a_dry_run_creates_nothing(run: Path, tmp_path: Path) -> None:
    """The command itself, on a run whose manifest says that all is up to date as far as `modelfile`."""
    folder = copied(run, tmp_path / "run")
    (tmp_path / "train.jsonl").write_text(ROW)
    (tmp_path / "pipeline.toml").write_text(
        f'[model]\nbase = "{small_models.BASE}"\n[data]\ntrain = "train.jsonl"\n[ollama]\nname = "not-this"\n'
    )
    settings, _ = resolved(tmp_path, ())
    manifest: dict[str, Any] = {"stages": {}, "files": {}}
    graph = Graph(all_stages())
    for node in graph.with_needs(graph.nodes_of("modelfile", settings), settings):
        manifest["stages"][str(node)] = {
            **small_models.RECORD,
            **graph.basis(node, settings, manifest).record(),
            "outputs": record_files(folder / node.stage / node.variant, folder),
        }
    write_manifest(folder, manifest)

    servers.engine()
    client, host = servers.client(), servers.ollama().host
    client.create("other:latest", {"from": "scratch-go:latest", "system": "old"})
    before = client.names()

    def given(*options: str) -> tuple[int, str]:
        result = pipeline("deploy", tmp_path, "--name", "other", *options)
        return result.exit_code, result.output

    status, told = given("--host", host, "--replace", "--dry-run")
    assert status == 0, told
    assert f"at {host}\ncreate: other:latest, which is there already, from " in told
    assert "rendered by TEMPLATE\n" in told
    assert config_of(folder).ollama.replace
    status, told = given("--host", "127.0.0.1:1", "--dry-run")
    assert status == 2
    assert "no Ollama answers at http://127.0.0.1:1 " in told
    status, told = given("--host", host)
    assert status == 2
    assert "a model 'other:latest' is at" in told
    assert not config_of(folder).ollama.replace
    assert client.names() == before
    assert not (folder / "deploy").exists()
    client.delete("other:latest")


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
    from pipeline.ollama.ollama_server import find_ollama

    folder = run / "modelfile" / "q4_k_m"
    served, _, _ = planned(folder)
    program = find_ollama()
    assert program is not None
    environment = {**os.environ, "OLLAMA_HOST": servers.ollama().host, "HOME": str(run)}
    subprocess.run(
        [program, "create", "typed", "-f", "Modelfile"], cwd=folder, env=environment, check=True, capture_output=True
    )
    read_back(servers.client(), "typed:latest", served, served.template)
    servers.client().delete("typed:latest")


def test_texts_are_served_and_read_back(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path / "run")
    texts = {"system": 'Answer like a pirate.\n"""\nArr.', "license": "MIT"}
    modelfile.main(task(folder, "modelfile", "q4_k_m", **texts))
    deploy.main(task(folder, host=servers.ollama().host, name="pirate", **texts))
    client = servers.client()
    shown = client.show("pirate:latest")
    assert {key: shown[key] for key in texts} == texts
    meant, gguf, adapter = planned(folder / "modelfile" / "q4_k_m")
    assert adapter is None
    template = template_in_force(meant, gguf)
    assert differences(shown, meant, template) == []
    for what, other in (
        ("licence: 'MIT' instead of ''", replace(meant, licenses=())),
        ("messages: [] instead of [{", replace(meant, messages=({"role": "user", "content": "x"},))),
        ("system text: 'Answer", replace(meant, system="Arr.")),
        ("parameter seed is None instead of 1", replace(meant, parameters={**meant.parameters, "seed": 1})),
        ("nobody asked for: num_ctx", replace(meant, parameters={})),
        ("REQUIRES is", replace(meant, requires="0.33.0")),
    ):
        (wrong,) = [words for words in differences(shown, other, template) if what in words]
        with pytest.raises(PipelineError, match=re.escape(wrong)):
            read_back(client, "pirate:latest", other, template)
    assert "the template in force" in differences(shown, meant, "x")[0]
    client.delete("pirate:latest")


def test_a_users_server_whose_disk_is_full(run: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.ollama.scratch_model import write_scratch_model

    with OllamaServer(small_disk / "models") as server, Client(server.host) as client:
        # It is not known where this server's models are: it has to say it itself.
        with pytest.raises(PipelineError, match="no space left|disk is full"):
            deploy.main(task(run, host=server.host, name="full"))
        digest = client.upload(write_scratch_model(small_disk / "scratch.gguf"))
        client.create("there", {"files": {"scratch.gguf": digest}})
        assert local_store(client) is None
        monkeypatch.setenv("OLLAMA_MODELS", str(small_disk / "models"))
        assert local_store(client) == small_disk / "models"
        with pytest.raises(PipelineError, match="too full for Ollama's copy of the model"):
            deploy.main(task(run, host=server.host, name="full"))
        monkeypatch.setenv("OLLAMA_MODELS", str(servers.ollama().models))
        assert local_store(client) is None

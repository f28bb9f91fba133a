"""Two adapters on one base, in one llama-server and in one Ollama: each answers as its own merged model does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import servers
from support.commands import pipeline
from support.shared_base import KIND, QUESTIONS, SYSTEM, adapter_of, config_of, do, run_of

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp import adapter_proxy
from pipeline.llamacpp.adapter_proxy import AdapterProxy, ServedAdapter
from pipeline.llamacpp.gguf_file import inspect
from pipeline.model.load import load_float32
from pipeline.ollama.deployment import differences, planned, template_in_force
from pipeline.ollama.serving import llama_server
from pipeline.processes import stop
from pipeline.prompt.template import ChatTemplate, token_ids
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.resources import sha256_of
from pipeline.run.layout import Layout
from pipeline.serve import together
from pipeline.stages import deploy
from pipeline.toml_file import load_config

NAMES = ("one", "two")
TOKENS = 8
NEAR = 0.1  # nats by which another token may have led: what Q8_0 and bfloat16 round away


@cache
def merged(name: str) -> tuple[Any, Any]:
    folder = Layout(run_of(name)).merged_model
    return load_float32(folder), saved_tokenizer(folder)


def says(name: str, question: str, answer: str) -> bool:
    """Whether the merged model of an adapter answers so, token by token, but for near ties."""
    import torch

    model, tokenizer = merged(name)
    messages = [{"role": "system", "content": SYSTEM[name]}] if SYSTEM[name] else []
    messages.append({"role": "user", "content": question})
    prompt = token_ids(tokenizer, ChatTemplate.from_tokenizer(tokenizer, name).render(messages))
    said: list[int] = []
    while len(said) < TOKENS:
        with torch.inference_mode():
            scores = model(torch.tensor([prompt + said])).logits[0, -1].log_softmax(-1)
        near = torch.nonzero(scores > scores.max() - NEAR).flatten().tolist()
        texts = {token: tokenizer.decode([*said, token], skip_special_tokens=True) for token in near}
        # A token may end within a character, which the next one completes.
        fitting = [token for token, text in texts.items() if answer.startswith(text.rstrip("\ufffd"))]
        if not fitting:
            return False
        said.append(max(fitting, key=lambda token: (len(texts[token]), float(scores[token]))))
    return tokenizer.decode(said, skip_special_tokens=True).rstrip("\ufffd") == answer.rstrip("\ufffd")


@contextmanager
def proxy(key: str = "") -> Iterator[AdapterProxy]:
    served = together([run_of(name) for name in NAMES], None)
    names = {
        each.name: ServedAdapter(number, each.system, {"temperature": 0, "max_tokens": TOKENS})
        for number, each in enumerate(served)
    }
    with (
        llama_server(served[0].base, 512, adapters=[each.adapter for each in served]) as server,
        AdapterProxy(server, names, "127.0.0.1", 0, key) as front,
    ):
        thread = threading.Thread(target=front.serve_forever, daemon=True)
        thread.start()
        yield front
        front.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with proxy() as front, httpx.Client(base_url=front.url, timeout=60, trust_env=False) as asking:
        yield asking


def ask(client: httpx.Client, name: str, question: str, **more: Any) -> httpx.Response:
    body = {"model": f"shared-{name}", "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS}
    return client.post("/v1/chat/completions", json=body | more)


def test_each_request_is_answered_by_the_adapter_that_it_names(client: httpx.Client) -> None:
    answers: dict[str, list[str]] = {name: [] for name in NAMES}
    for question in QUESTIONS:
        for name in NAMES:
            said = ask(client, name, question).json()
            assert said["model"] == f"shared-{name}"
            answers[name].append(said["choices"][0]["message"]["content"])
    for name, other in (NAMES, NAMES[::-1]):
        pairs = list(zip(QUESTIONS, answers[name], strict=True))
        assert all(says(name, *pair) for pair in pairs)
        assert not any(says(other, *pair) for pair in pairs)  # it can tell them apart
    again = [ask(client, "one", question).json()["choices"][0]["message"]["content"] for question in QUESTIONS]
    assert again == answers["one"]  # after the other one, as before it


def test_a_stream_is_the_same_answer(client: httpx.Client) -> None:
    whole = ask(client, "one", QUESTIONS[0]).json()["choices"][0]["message"]["content"]
    lines = ask(client, "one", QUESTIONS[0], stream=True).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]) == whole
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert {event["model"] for event in events} == {"shared-one"}


def test_a_chat_changes_to_another_adapter_in_the_middle(client: httpx.Client) -> None:
    url, question = str(client.base_url), QUESTIONS[0]
    answers = [ask(client, name, question).json()["choices"][0]["message"] for name in NAMES]
    one, two = (answer["content"] for answer in answers)
    typed = f"{question}\n/adapter\n/adapter shared-three\n/adapter shared-two\n{question}\n\n"
    told = pipeline("chat", "--server", url, input=typed)
    assert told.exit_code == 0, told.stderr
    assert told.stdout.startswith(f"{one}\n")
    assert told.stderr.splitlines() == [
        "(shared-one answers; there are shared-one, shared-two)",
        "(there is no shared-three; shared-one answers; there are shared-one, shared-two)",
        "(shared-two answers; there are shared-one, shared-two)",
    ]
    both = ["chat", "--server", f"{url}/v1", "--model", "shared-one", "--model", "shared-two", "-m", question]
    told = pipeline(*both, "--compare")
    assert told.stdout == f"shared-one: {one}\nshared-two: {two}\n"
    assert "they part at character" in told.stderr
    assert "shared-one, shared-two: exclude each other" in pipeline(*both).stderr
    assert "there is none at" in pipeline(*both[:4], "shared-three", "-m", "x").stderr
    assert "--model goes with --server" in pipeline("chat", "--model", "x").stderr
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        nowhere = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    assert "no `pipeline serve` answers there" in pipeline("chat", "--server", nowhere).stderr


def test_what_is_no_request(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["shared-one", "shared-two"]
    assert client.get("/health").json() == {"status": "ok"}
    told = ask(client, "three", "Hi")
    assert told.status_code == 404
    assert "the models are shared-one, shared-two" in told.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 404
    assert client.post("/v1/chat/completions", content=b"[1]").status_code == 400
    assert client.post("/v1/chat/completions", content=b"{").status_code == 400
    assert client.post("/lora-adapters", json=[]).status_code == client.get("/props").status_code == 404
    refused = client.post("/v1/chat/completions", json={"model": "shared-one", "messages": "no"})
    assert refused.status_code == 400  # llama-server's own words
    assert "messages" in refused.json()["error"]["message"]
    monkeypatch.setattr(adapter_proxy, "LARGEST_REQUEST", 10)
    assert ask(client, "one", "Hi").status_code == 413


def test_a_key_is_wanted_where_there_is_one() -> None:
    with proxy("secret") as front, httpx.Client(base_url=front.url, trust_env=False) as asking:
        assert asking.get("/v1/models").status_code == 401
        assert ask(asking, "one", "Hi").json()["error"]["code"] == "invalid_api_key"
        assert asking.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        stop(front.server.process)
        with pytest.raises(PipelineError, match="llama-server has ended"):
            front.service_actions()


def test_beyond_this_machine_a_key_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        told = pipeline("serve", run_of("one"), "--host", host)
        assert told.exit_code == 2
        assert "set the variable PIPELINE_API_KEY" in told.stderr


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = [sys.executable, "-m", "pipeline", "serve", *(str(run_of(name)) for name in NAMES), "--port", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            arguments,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
        )
    try:
        while not (found := [line for line in log.read_text().splitlines() if "Ctrl-C stops it" in line]):
            assert process.poll() is None, log.read_text()
        url = found[0].split("/v1")[0]
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as asking:
            assert ask(asking, "two", "Hi", max_tokens=2).status_code == 200
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
    assert "stopped" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_what_cannot_be_served_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two runs are called 'shared-one'"):
        together([run_of("one")] * 2, None)
    with pytest.raises(UserError, match="quantize/q4_k_m is not made yet: run `pipeline export --as adapter"):
        together([run_of("one")], "q4_k_m")
    other = tmp_path / "other"
    shutil.copytree(run_of("two"), other)
    manifest = json.loads((other / "manifest.json").read_text())
    file = str(Layout(other).quantized(KIND).relative_to(other))
    manifest["stages"][f"quantize/{KIND}"]["outputs"][file]["sha256"] = "0"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="shared-two cannot be served beside shared-one: they were trained on other"):
        together([run_of("one"), other], None)
    Layout(other).gguf_adapter.unlink()
    with pytest.raises(UserError, match=r"convert convert/adapter\.gguf is missing"):
        together([other], None)


def test_an_adapters_folder_is_exported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr("pipeline.cli.bring_up_to_date", lambda config, sources, names: asked.extend(names))
    with pytest.raises(UserError, match="convert is not made yet"):
        together([adapter_of("one")], "q8_0")
    project = tmp_path / "shared-one-export" / "pipeline.toml"
    config, _ = load_config(project)
    assert (config.export.as_, config.export.quant, asked) == ("adapter", ("q8_0",), ["modelfile"])
    project.write_text(project.read_text().replace('as = "adapter"', 'as = "merged"'))  # the user's word counts
    with pytest.raises(UserError, match="run `pipeline export --as adapter --quant q8_0` on it first"):
        together([adapter_of("one")], "q8_0")
    assert asked == ["modelfile"]


def test_both_in_one_ollama_share_the_base(tmp_path: Path) -> None:
    """Created, read back and proven by the stage; then asked like their merged models."""
    client = servers.client()
    try:
        for name in NAMES:
            run = tmp_path / name
            shutil.copytree(run_of(name), run)
            assert do(deploy, run, deployed(name))["deployed"]
            record = json.loads(Layout(run).deployment.read_text())["models"][0]
            assert record["adapter_bytes"] == Layout(run_of(name)).gguf_adapter.stat().st_size
            for question in QUESTIONS:
                messages = [{"role": "user", "content": question}]
                answer = client.chat(f"shared-{name}", messages, options={"temperature": 0, "num_predict": TOKENS})
                assert says(name, question, answer["content"])
        lines = [line for name in NAMES for line in client.show(f"shared-{name}")["modelfile"].splitlines()]
        assert len({line for line in lines if line.startswith("FROM /")}) == 1
        assert len({line for line in lines if line.startswith("ADAPTER ")}) == 2
        plan, gguf, adapter = planned(Layout(run_of("one")).create_request(KIND).parent)
        shown, template = client.show("shared-one"), template_in_force(plan, gguf)
        assert differences(shown, plan, template, adapter) == []
        for other in (Layout(run_of("two")).gguf_adapter, None):  # what was dropped, or is another's, is found
            (words,) = differences(shown, plan, template, other)
            assert words.startswith("its adapters are ")
    finally:
        for name in NAMES:
            client.delete(f"shared-{name}")


def deployed(name: str) -> Any:
    ollama = config_of(name).ollama.model_dump() | {"host": servers.ollama().host}
    return config_of(name, ollama=ollama)


def test_every_run_on_a_base_has_the_same_file_of_it() -> None:
    info = inspect(Layout(run_of("one")).gguf_16bit())
    assert info.metadata["general.name"] == "base"
    assert (Layout(run_of("one")).modelfile(KIND)).read_text().splitlines()[2].startswith("ADAPTER ")
    assert sha256_of(Layout(run_of("two")).gguf_16bit()) == sha256_of(info.path)

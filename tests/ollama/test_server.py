"""A server of our own: where it is found, that it is alone, and that nothing of it outlives us."""

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from support import servers

from pipeline.errors import PipelineError, UserError
from pipeline.ollama.client import Client, check_name, normal_host
from pipeline.ollama.server import OllamaServer, find_ollama, new_enough, program_version


def test_the_pinned_ollama_is_found_and_says_its_version() -> None:
    program = find_ollama()
    assert program is not None
    assert new_enough(program_version(program))


@pytest.mark.parametrize(
    ("version", "enough"),
    [("0.34.0", True), ("0.32.0", True), ("1.0", True), ("0.31.9", False), ("0.9.6", False), ("0.0.0", False)],
)
def test_versions_are_compared_as_numbers(version: str, enough: bool) -> None:
    assert new_enough(version) is enough


def test_a_wrong_variable_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIPELINE_OLLAMA", str(tmp_path))
    with pytest.raises(UserError, match="PIPELINE_OLLAMA"):
        find_ollama()
    old = tmp_path / "ollama"
    old.write_text("#!/bin/sh\necho client version is 0.12.3\n")
    old.chmod(0o755)
    monkeypatch.setenv("PIPELINE_OLLAMA", str(old))
    with pytest.raises(UserError, match=r"Ollama 0\.12\.3 is too old.*unset PIPELINE_OLLAMA"):
        find_ollama()


def test_a_program_that_ends_at_once_is_told_with_its_log(tmp_path: Path) -> None:
    program = tmp_path / "ollama"
    program.write_text("#!/bin/sh\necho it is broken\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(PipelineError, match="it is broken"), OllamaServer(tmp_path / "models", program=program):
        pass


def test_it_is_gone_at_the_end_and_so_are_its_runners(tmp_path: Path) -> None:
    from pipeline.ollama.scratch_model import write_scratch_model

    with OllamaServer(tmp_path / "models") as server, Client(server.host) as client:
        digest = client.upload(write_scratch_model(tmp_path / "scratch.gguf"))
        client.create("a:latest", {"files": {"scratch.gguf": digest}, "template": "{{ range .Messages }}x{{ end }}"})
        assert client.render("a:latest", [{"role": "user", "content": "hi"}]) == "x"
        process = server._process
        assert process is not None
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert any("llama-server" in one.name() for one in family)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_it_dies_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pipeline.ollama.server import OllamaServer\n"
        "with OllamaServer(Path(sys.argv[1])) as server:\n"
        "    print(server._process.pid, flush=True); time.sleep(60)\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    child.wait(timeout=10)
    parent.stdout.close()


@contextmanager
def answering(body: bytes) -> Iterator[str]:
    """Something on a port that is no Ollama, or an old one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_old_server_is_refused() -> None:
    with answering(json.dumps({"version": "0.12.3"}).encode()) as host, pytest.raises(UserError, match="too old"):
        Client(host)


def test_something_else_on_the_port_is_refused() -> None:
    with answering(b"<html>hello</html>") as host, pytest.raises(UserError, match="no Ollama answers"):
        Client(host)


def test_a_server_that_is_down_is_refused_soon() -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match="no Ollama answers at http://127.0.0.1:1 "):
        Client("127.0.0.1:1")
    assert time.monotonic() - started < 30  # it does not hang: no more is claimed


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("127.0.0.1", "http://127.0.0.1:11434"),
        ("localhost:8080", "http://localhost:8080"),
        ("http://host", "http://host:80"),
        ("https://host/", "https://host:443"),
        ("0.0.0.0:11434", "http://127.0.0.1:11434"),
        ("[::1]:11434", "http://[::1]:11434"),
        (":11435", "http://127.0.0.1:11435"),
        ('"127.0.0.1:8080"', "http://127.0.0.1:8080"),
    ],
)
def test_addresses_are_read_as_ollama_reads_them(given: str, meant: str) -> None:
    assert normal_host(given) == meant


@pytest.mark.parametrize(
    "given",
    ["", "  ", "ftp://host", "http://", "host:99999", "host:port", "://", "a b", "a\tb", "a!b", "a..b", "[a:b]"],
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="not an address"):
        normal_host(given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("home", "home:latest"),
        ("home:q4_k_m", "home:q4_k_m"),
        ("me/home", "me/home:latest"),
        ("host.example:5000/me/home:1", "host.example:5000/me/home:1"),
        ("Qwen2.5-7B_x", "Qwen2.5-7B_x:latest"),
        ("a" * 80, "a" * 80 + ":latest"),
    ],
)
def test_names_that_ollama_takes(given: str, meant: str) -> None:
    assert check_name(given) == meant
    servers.client().create(meant, {"from": _scratch(), "system": given})
    assert meant in servers.client().names()
    servers.client().delete(meant)


def _scratch() -> str:
    servers.engine()
    return "scratch-go:latest"


@pytest.mark.parametrize(
    "given",
    [
        "", " ", "a b", "a/b/c/d", "-a", ".a", "a:", ":a", "a:b:c", "a//b", "/a", "a/", "../a", "a/../b", "a\nb",
        "a\nSYSTEM b", "é", "a" * 81, "a:" + "b" * 81, "a@sha256:1", "a;b", "$(a)", "`a`", "a\\b", "a.b/c", "a\0b",
        "host:1/a", "a:latest ",
    ],
)  # fmt: skip
def test_names_that_ollama_would_not_take(given: str) -> None:
    with pytest.raises(UserError, match="not a name"):
        check_name(given)


@pytest.mark.parametrize("given", ["deepseek-r1", "me/deepseek-r1:8b", "DeepSeek-R1"])
def test_a_name_that_changes_the_prompt(given: str) -> None:
    with pytest.raises(UserError, match="drops the thinking"):
        check_name(given)
    assert check_name(f"home-{given.rpartition('/')[2]}")


@pytest.mark.parametrize("tag", ["local", "cloud", "Cloud", "LOCAL", "x-cloud", "q4_k_m-Cloud"])
def test_a_tag_that_leads_to_another_model(tag: str) -> None:
    with pytest.raises(UserError, match=f"takes the tag '{tag}' for where a model runs"):
        check_name(f"host.example:5000/me/home:{tag}")
    assert check_name(f"{tag}/home-{tag}:{tag}2") == f"{tag}/home-{tag}:{tag}2"


def test_an_upload_is_made_once_and_its_digest_is_the_files(tmp_path: Path) -> None:
    from pipeline.resources import sha256_of

    path = tmp_path / "blob"
    path.write_bytes(os.urandom(3 << 20))
    seen: list[float] = []
    assert servers.client().upload(path, seen.append) == f"sha256:{sha256_of(path)}"
    assert seen[-1] == path.stat().st_size
    assert len(seen) == 3
    again: list[float] = []
    servers.client().upload(path, again.append)
    assert again == [path.stat().st_size]


def test_a_disk_that_is_full_when_the_model_is_checked(small_disk: Path, tmp_path: Path) -> None:
    from pipeline.ollama.scratch_model import write_scratch_model

    path, store = write_scratch_model(tmp_path / "scratch.gguf"), small_disk / "models"
    with OllamaServer(store, log=tmp_path / "log") as server, Client(server.host) as client:
        digest = client.upload(path, store=store)
        (small_disk / "rest").write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))
        with pytest.raises(PipelineError, match=r"llama-quantize failed.*most likely the disk .* is full"):
            client.create("full", {"files": {"scratch.gguf": digest}})
        with pytest.raises(PipelineError, match="too full for Ollama's copy of the model"):
            client.upload(path, store=store)  # it is there, and has to be copied again


def test_a_server_that_dies_is_told_whatever_it_was_asked(tmp_path: Path) -> None:
    from pipeline.stages.deploy import _remove

    (tmp_path / "blob").write_bytes(b"x")
    with OllamaServer(tmp_path / "models") as server:
        client = Client(server.host)
    hello = [{"role": "user", "content": "hi"}]
    requests: tuple[Callable[[], object], ...] = (
        client.names,
        lambda: client.show("a"),
        lambda: client.render("a", hello),
        lambda: client.chat("a", hello),
        lambda: list(client.stream("a", hello)),
        lambda: client.upload(tmp_path / "blob"),
        lambda: client.create("a", {"from": "b", "requires": "0.34.0"}),
        lambda: client.copy("a", "b"),
        lambda: client.unload("a"),
        lambda: client.delete("a"),
    )
    for request in requests:
        with pytest.raises(PipelineError, match=f"Ollama at {server.host} stopped answering: ."):
            request()
    _remove(client, "pipeline-proof")  # what hid the error that ended the deployment


def test_what_the_server_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + os.urandom(2000))
    digest = servers.client().upload(path)
    with pytest.raises(PipelineError, match="Ollama at http"):
        servers.client().create("broken:latest", {"files": {"model.gguf": digest}})
    assert "broken:latest" not in servers.client().names()
    with pytest.raises(PipelineError, match="cannot be shown"):
        servers.client().show("not-there:latest")

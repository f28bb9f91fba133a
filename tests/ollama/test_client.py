"""What is asked of an Ollama, directly and through a proxy, and what is said when it refuses, breaks off or is gone."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support import servers, small_models
from support.commands import pipeline
from support.proxy import proxy

from pipeline.errors import PipelineError, UserError
from pipeline.ollama.client import Client
from pipeline.ollama.deployment import remove
from pipeline.ollama.ollama_server import OllamaServer
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.prompt.conformance import RenderRefused
from pipeline.resources import sha256_of

ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"  # str.splitlines takes each of them for a line's end
HELLO = [{"role": "user", "content": "hi"}]


@contextmanager
def answering(pages: Mapping[str, bytes]) -> Iterator[str]:
    """A server that says the same whatever it is asked, by path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(pages[self.path])

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def streamed(*contents: str) -> dict[str, bytes]:
    """An Ollama's pages: an answer in these pieces, as it writes JSON, with every character but controls as it is."""
    steps = [{"message": {"content": content}} for content in contents]
    lines = [json.dumps(step, ensure_ascii=False) + "\n" for step in [*steps, {"message": {}, "done": True}]]
    return {
        "/api/version": b'{"version": "0.34.0"}',
        "/api/tags": b'{"models": [{"model": "odd:latest", "digest": "d"}]}',
        "/api/chat": "".join(lines).encode(),
    }


def test_an_answer_with_line_ends_of_every_kind_is_streamed_whole(tmp_path: Path) -> None:
    with answering(streamed(ODD, "\n", ODD)) as host:
        with Client(host) as client:
            assert list(client.stream("odd", HELLO)) == [ODD, "\n", ODD, ""]
        (tmp_path / "train.jsonl").write_text("{}")
        config = tmp_path / "pipeline.toml"
        config.write_text(f'[model]\nbase = "{small_models.BASE}"\n[data]\ntrain = "train.jsonl"\n')
        (tmp_path / "run" / "deploy").mkdir(parents=True)
        model = {"name": "odd:latest", "digest": "d"}
        record = {"deployed": True, "own_server": False, "host": host, "models": [model]}
        (tmp_path / "run" / "deploy" / "deploy.json").write_text(json.dumps(record))
        told = pipeline("chat", config, "-m", "Hi")
    assert told.exit_code == 0, told.output
    assert told.output == f"{ODD}\n{ODD}\n"


def test_an_answer_that_breaks_off_is_told() -> None:
    pages = streamed("a")
    pages["/api/chat"] += b'{"message": {"con'
    with answering(pages) as host, Client(host) as client, pytest.raises(PipelineError, match="breaks off"):
        list(client.stream("odd", HELLO))
    pages["/api/chat"] = b'{"error": "out of luck"}\n'
    with answering(pages) as host, Client(host) as client, pytest.raises(PipelineError, match="out of luck"):
        list(client.stream("odd", HELLO))


# Through a proxy.


def test_below_a_path(tmp_path: Path) -> None:
    with proxy(servers.ollama().host, prefix="/ollama") as host:
        with Client(f"{host}/ollama/") as client:
            assert client.host == f"{host}/ollama"
            digest = client.upload(write_scratch_model(tmp_path / "scratch.gguf"))
            client.create("proxied:latest", {"files": {"scratch.gguf": digest}, "requires": "0.32.0"})
            assert client.show("proxied")["requires"] == "0.32.0"
            assert client.digest("proxied") == servers.client().digest("proxied")
            client.delete("proxied:latest")
        with pytest.raises(UserError, match=r"HTTP status 404 Not Found: there is no Ollama at this path") as error:
            Client(host)
        assert "html" not in str(error.value)


def test_with_a_user_and_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(servers.ollama().host, login="me:a secret") as host:
        for given in ("", host.replace("//", "//me:nope@")):
            monkeypatch.setenv("OLLAMA_HOST", given)
            with pytest.raises(UserError, match=r"HTTP status 401 .*set the variable OLLAMA_HOST") as error:
                Client(host)
            assert "html" not in str(error.value)
            assert "nope" not in str(error.value)
        monkeypatch.setenv("OLLAMA_HOST", host.replace("//", "//me:a%20secret@"))
        with Client(host) as client:
            assert client.names() == servers.client().names()


def test_a_proxy_that_takes_no_large_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(os.urandom(3 << 20))
    with proxy(servers.ollama().host, limit=1 << 20) as host, Client(host) as client:
        with pytest.raises(PipelineError, match=r"blob was not taken .* status 413 .*client_max_body_size") as error:
            client.upload(tmp_path / "blob")
        assert "html" not in str(error.value)


def test_only_a_template_refuses_to_render(tmp_path: Path) -> None:
    """What stands in front of Ollama, or has ended behind it, says nothing about a template."""
    with proxy(servers.ollama().host, limit=20_000) as host, Client(host) as client:
        digest = servers.client().upload(write_scratch_model(tmp_path / "scratch.gguf"))
        servers.client().create(
            "picky:latest", {"files": {"scratch.gguf": digest}, "template": "{{ slice .Model 99 }}"}
        )
        with pytest.raises(RenderRefused):
            client.render("picky:latest", HELLO)
        with pytest.raises(PipelineError, match="status 413") as error:
            client.render("picky:latest", [{"role": "user", "content": "long " * 10_000}])
        assert not isinstance(error.value, RenderRefused)
        client.delete("picky:latest")


def test_a_proxy_without_an_ollama() -> None:
    pages = {"/api/version": b'{"version": "0.34.0"}', "/api/tags": b""}
    with answering(pages) as gone:
        pass
    with proxy(gone) as host, pytest.raises(UserError, match="no Ollama answers"):
        Client(host)


# What is asked.


def test_an_old_server_is_refused() -> None:
    with answering({"/api/version": b'{"version": "0.12.3"}'}) as host, pytest.raises(UserError, match="too old"):
        Client(host)


def test_something_else_on_the_port_is_refused() -> None:
    with (
        answering({"/api/version": b"<html>hello</html>"}) as host,
        pytest.raises(UserError, match="no Ollama answers"),
    ):
        Client(host)


def test_a_server_that_is_down_is_refused_soon() -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match="no Ollama answers at http://127.0.0.1:1 "):
        Client("127.0.0.1:1")
    assert time.monotonic() - started < 30  # it does not hang: no more is claimed


def test_an_upload_is_made_once_and_its_digest_is_the_files(tmp_path: Path) -> None:
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
    path, store = write_scratch_model(tmp_path / "scratch.gguf"), small_disk / "models"
    with OllamaServer(store, log=tmp_path / "log") as server, Client(server.host) as client:
        digest = client.upload(path, store=store)
        (small_disk / "rest").write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))
        with pytest.raises(PipelineError, match=r"llama-quantize failed.*most likely the disk .* is full"):
            client.create("full", {"files": {"scratch.gguf": digest}})
        with pytest.raises(PipelineError, match="too full for Ollama's copy of the model"):
            client.upload(path, store=store)  # it is there, and has to be copied again


def test_a_server_that_dies_is_told_whatever_it_was_asked(tmp_path: Path) -> None:
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
    remove(client, "pipeline-proof")  # what hid the error that ended the deployment


def test_what_the_server_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + os.urandom(2000))
    digest = servers.client().upload(path)
    with pytest.raises(PipelineError, match="Ollama at http"):
        servers.client().create("broken:latest", {"files": {"model.gguf": digest}})
    assert "broken:latest" not in servers.client().names()
    with pytest.raises(PipelineError, match="cannot be shown"):
        servers.client().show("not-there:latest")

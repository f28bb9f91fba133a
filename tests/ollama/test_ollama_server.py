"""A server of our own: where it is found, that it is alone, and that nothing of it outlives us."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.errors import PipelineError, UserError
from pipeline.ollama.client import Client
from pipeline.ollama.ollama_server import OllamaServer, find_ollama
from pipeline.setup.ollama_version import new_enough, program_version


def test_the_pinned_ollama_is_found_and_says_its_version() -> None:
    program = find_ollama()
    assert program is not None
    assert new_enough(program_version(program))


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
        assert server.pid is not None
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert any("llama-server" in one.name() for one in family)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_it_dies_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pipeline.ollama.ollama_server import OllamaServer\n"
        "with OllamaServer(Path(sys.argv[1])) as server:\n"
        "    print(server.pid, flush=True); time.sleep(60)\n"
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

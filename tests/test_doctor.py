"""`pipeline doctor`, as a command, on machines that lack one thing or another."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.resources import cache_folder
from pipeline.setup import places

ROOT = Path(__file__).parents[1]


def doctor(*arguments: str, folder: Path = ROOT, **variables: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Its status, and its findings by their subjects."""
    command = [sys.executable, "-m", "pipeline", "doctor", "--json", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OLLAMA_HOST": "", **variables}
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in answer.stderr, answer.stderr
    content = json.loads(answer.stdout)
    assert (content["verdict"] == "failure") == (answer.returncode == 1)
    return answer.returncode, {finding["subject"]: finding for finding in content["findings"]}


def test_machine_with_everything() -> None:
    status, found = doctor()
    assert status == 0, found
    assert {finding["state"] for finding in found.values()} <= {"ok", "warning"}
    for subject in ("Python", "libraries", "C++ compiler", "CMake", "Go", "llama.cpp", "memory", "GPU"):
        assert subject in found
    assert any(subject.startswith("disk of the cache") for subject in found)
    assert found["libraries"]["state"] == found["llama.cpp"]["state"] == "ok"
    program = places.ollama_program()
    if program is not None:
        assert str(program) in found["Ollama"]["found"] or "running at" in found["Ollama"]["found"]


def test_table_for_a_person_says_what_to_do(tmp_path: Path) -> None:
    environment = {**os.environ, "PIPELINE_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pipeline", "doctor"]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    (line,) = [line for line in answer.stdout.splitlines() if line.startswith("llama.cpp")]
    assert "failure" in line
    assert "run `pipeline setup`" in line


@pytest.fixture
def cache_without_ollama(tmp_path: Path) -> Path:
    """Everything that set-up built, but Ollama."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in cache_folder().iterdir():
        if not path.name.startswith("ollama-"):
            (cache / path.name).symlink_to(path)
    return cache


def test_without_go_and_without_ollama_the_rest_works(cache_without_ollama: Path, without: Callable[..., str]) -> None:
    status, found = doctor(PATH=without("go", "ollama"), PIPELINE_CACHE=str(cache_without_ollama))
    assert status == 0
    assert found["Go"]["state"] == found["Ollama"]["state"] == "warning"
    assert "install Go and run `pipeline setup`" in found["Ollama"]["remedy"]


def test_without_a_compiler_llama_cpp_cannot_be_built(tmp_path: Path, without: Callable[..., str]) -> None:
    path = without("c++", "g++", "clang++", "x86_64-linux-gnu-g++")
    status, found = doctor(PATH=path, PIPELINE_CACHE=str(tmp_path / "empty"), CXX="")
    assert status == 1
    assert found["C++ compiler"]["state"] == "failure"
    assert "apt-get install g++" in found["C++ compiler"]["remedy"]
    assert found["llama.cpp"]["state"] == "failure"
    status, found = doctor(PIPELINE_CACHE=str(tmp_path / "empty"), CXX="/nowhere/c++ -O2")
    assert status == 1
    assert found["C++ compiler"]["found"] == "CXX=/nowhere/c++ -O2: no such program"
    # Where it is built already, a run needs no compiler.
    status, found = doctor(PATH=path, CXX="")
    assert (status, found["C++ compiler"]["state"]) == (0, "warning")


def test_full_disk_of_the_cache(small_disk: Path) -> None:
    status, found = doctor(PIPELINE_CACHE=str(small_disk / "cache"))
    assert status == 1
    assert found["disk of the cache"]["state"] == "failure"
    assert "set-up needs about" in found["disk of the cache"]["found"]


def test_full_disk_of_the_run(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "pipeline.toml").write_text(
        f"[model]\nbase = 'smollm2-135m-instruct'\n[data]\ntrain = 'train.jsonl'\n[run]\nfolder = '{small_disk}/run'\n"
    )
    for arguments, folder in (((str(tmp_path),), ROOT), ((), tmp_path)):
        status, found = doctor(*arguments, folder=folder)
        assert status == 1
        assert str(small_disk / "run") in found["disk of the run"]["found"]
        assert found["disk of the run"]["state"] == "failure"


def test_ollama_that_is_named_and_is_none_is_a_failure(tmp_path: Path) -> None:
    status, found = doctor(PIPELINE_OLLAMA=str(tmp_path / "nothing"))
    assert (status, found["Ollama"]["state"]) == (1, "failure")
    assert "PIPELINE_OLLAMA" in found["Ollama"]["found"]


def test_gpu_that_cannot_be_trained_on_is_a_failure(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU-1, Tesla P100-PCIE-16GB, 16280, 470.57.02, [N/A], 6.0'\n")
    program.chmod(0o755)
    status, found = doctor(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert status == 1
    assert found["NVIDIA driver"]["state"] == found["compute capability"]["state"] == "failure"
    status, found = doctor(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="-1")
    assert (status, found["GPU"]["state"]) == (0, "ok")


def test_configuration_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "doctor", str(tmp_path / "nothing.toml")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ")


def test_an_ollama_that_is_named_and_does_not_answer_is_a_failure() -> None:
    status, found = doctor(OLLAMA_HOST="http://me:hush@127.0.0.1:1")
    assert (status, found["Ollama"]["state"]) == (1, "failure")
    assert "OLLAMA_HOST=http://***@127.0.0.1:1: no Ollama answers" in found["Ollama"]["found"]

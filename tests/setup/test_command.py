"""`pipeline setup`: nothing to do, what is missing, Ollama, what was built."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.packages import NO_NETWORK

from pipeline.errors import PipelineError
from pipeline.resources import cache_folder
from pipeline.setup import places
from pipeline.setup.ollama import build_ollama
from pipeline.setup.ollama_version import new_enough
from pipeline.setup.pins import load_pins

ROOT = Path(__file__).parents[2]
# Where `pipeline setup` has put things, before a test names another place.
REAL_CACHE = cache_folder()


def setup_command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "setup", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def one_error(answer: subprocess.CompletedProcess[str], status: int) -> str:
    assert answer.returncode == status, answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stderr.count("error: ") == 1
    return answer.stderr


def test_set_up_again_does_nothing_and_needs_no_network_and_no_tools(tmp_path: Path) -> None:
    answer = setup_command("--dev", PATH=str(tmp_path), GOPROXY="off", **NO_NETWORK)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.startswith("set up: libraries in ")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        (("c++", "g++", "clang++", "x86_64-linux-gnu-g++"), "no C++ compiler"),
        (("cc", "gcc", "clang"), "no C compiler"),
        (("cmake",), "no cmake"),
        (("ninja", "make"), "neither ninja nor make"),
    ],
)
def test_missing_build_tool_is_named(
    hidden: tuple[str, ...],
    said: str,
    without: Callable[..., str],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    text = one_error(setup_command(PATH=without(*hidden)), 1)
    assert said in text
    assert "run `pipeline setup` again" in text
    assert not list(cache.glob("llama.cpp-*"))


@pytest.fixture
def cache_without_ollama(cache: Path) -> Path:
    """Everything that set-up built, but Ollama."""
    pins_here = load_pins()
    built = places.source_home(pins_here.llama_cpp).name
    wheel = places.package_file(pins_here.packaged_base)
    (cache / "downloads").mkdir(parents=True)
    (cache / built).mkdir()
    for part in ("bin", "source"):
        assert (REAL_CACHE / built / part).exists(), "run `pipeline setup` first"
        (cache / built / part).symlink_to(REAL_CACHE / built / part)
    (cache / "downloads" / wheel.name).symlink_to(REAL_CACHE / "downloads" / wheel.name)
    return cache


def test_without_go_everything_else_is_set_up_and_it_says_so(
    cache_without_ollama: Path, without: Callable[..., str]
) -> None:
    answer = setup_command(PATH=without("go", "ollama"))
    assert answer.returncode == 0, answer.stderr
    assert "none can be built (Go: not on PATH): nothing to deploy to" in answer.stderr
    assert f"With Go {load_pins().ollama.go} or newer installed, `pipeline setup` builds Ollama" in answer.stderr


@pytest.mark.parametrize(("version", "used"), [("0.32.0", True), ("99.1.2", True), ("0.31.9", False), ("0.9.0", False)])
def test_system_ollama_is_used_when_it_is_new_enough(
    cache_without_ollama: Path, without: Callable[..., str], tmp_path: Path, version: str, used: bool
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    program = folder / "ollama"
    program.write_text(f"#!/bin/sh\necho 'Warning: could not connect' >&2\necho 'client version is {version}'\n")
    program.chmod(0o755)
    assert new_enough(version) is used  # what `deploy` asks
    text = program.read_bytes()
    answer = setup_command(PATH=f"{folder}{os.pathsep}{without('go', 'ollama')}")
    assert answer.returncode == 0, answer.stderr
    assert (f"using this machine's own, {program} ({version})" in answer.stderr) is used
    assert ("none can be built (Go: not on PATH)" in answer.stderr) is not used
    assert program.read_bytes() == text


@pytest.fixture
def go() -> str:
    found = shutil.which("go")
    if found is None:
        pytest.skip("no Go here")
    return found


def test_ollama_with_another_hash_is_refused(go: str, cache: Path, tmp_path: Path) -> None:
    pin = replace(load_pins().ollama, sum="h1:AAAA")
    with pytest.raises(PipelineError, match="wrong hash: h1:"):
        build_ollama(pin, tmp_path)
    assert not list(cache.glob("ollama-*"))


def test_ollama_without_a_network_says_so(
    go: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**NO_NETWORK, "GOMODCACHE": str(tmp_path / "mod"), "GOFLAGS": "-modcacherw"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError, match="network cannot be reached"):
        build_ollama(load_pins().ollama, tmp_path)


def test_go_that_is_too_old_is_told(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "path" / "go"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'go: module requires go >= 1.26.0 (running go 1.21)'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(PipelineError, match=r"this Go is too old for Ollama 0[.\d]+; install a newer one"):
        build_ollama(load_pins().ollama, tmp_path)


def test_pinned_go_is_the_one_that_ollama_asks_for(go: str) -> None:
    pin = load_pins().ollama
    asked = [go, "mod", "download", "-json", f"{pin.module}@v{pin.version}"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip("Ollama's source cannot be fetched here: its go.mod was not read")
    module = Path(json.loads(answer.stdout)["Dir"])
    assert f"\ngo {pin.go}\n" in (module / "go.mod").read_text()


def test_outside_a_virtual_environment_set_up_refuses() -> None:
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.prefix == sys.base_prefix or not python.exists():
        pytest.skip("no interpreter outside a virtual environment")
    answer = subprocess.run(
        [python, "-m", "pipeline", "setup"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": next(path for path in sys.path if path.endswith("site-packages"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "is not in a virtual environment" in one_error(answer, 2)


def test_what_was_built_starts_and_is_what_was_pinned() -> None:
    folder, source = places.llamacpp_folder(), places.llamacpp_source()
    assert folder is not None
    assert source is not None
    known = load_pins()
    answer = subprocess.run([folder / "llama-server", "--version"], capture_output=True, text=True, check=True)
    assert known.llama_cpp.commit in answer.stdout + answer.stderr
    for name in (*known.llama_cpp.first, *known.llama_cpp.later):
        assert (folder / name).is_file()
    for path in ("convert_hf_to_gguf.py", "gguf-py/gguf", "conversion", "models/templates"):
        assert (source / path).exists()
    program = places.ollama_program()
    if program is not None:
        asked = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        assert known.ollama.version in asked.stdout
        beside = program.parents[1] / "lib" / "ollama" / "llama-server"
        assert subprocess.run([beside, "--version"], capture_output=True, check=False).returncode == 0

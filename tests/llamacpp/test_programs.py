"""Finding llama.cpp's programs, running one, and what is said when it fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp import programs


def test_the_programs_of_the_pin_are_found() -> None:
    for name in ("llama-quantize", "llama-server", "llama-perplexity"):
        assert os.access(programs.program(name), os.X_OK)
    assert (programs.source_tree() / "gguf-py" / "gguf" / "__init__.py").is_file()


def test_a_missing_program_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_LLAMACPP", str(tmp_path))
    monkeypatch.setenv("PIPELINE_LLAMACPP_SOURCE", str(tmp_path))
    with pytest.raises(UserError, match="llama-quantize is not at .*PIPELINE_LLAMACPP names another folder"):
        programs.program("llama-quantize")
    with pytest.raises(UserError, match="converter is not at"):
        programs.source_tree()


def test_without_set_up_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_LLAMACPP", raising=False)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="run `pipeline setup`"):
        programs.program("llama-quantize")


def test_lines_arrive_one_by_one_and_carriage_returns_end_them() -> None:
    code = r"""
import sys
sys.stdout.write("one\rtwo\nthree")
sys.stdout.flush()
sys.stderr.write("\nfour\n")
sys.exit(3)
"""
    lines: list[str] = []
    assert programs.run([sys.executable, "-c", code], on_line=lines.append) == 3
    assert lines == ["one", "two", "three", "four"]


def test_variables_are_set_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GONE", "1")
    lines: list[str] = []
    code = "import os; print(os.environ.get('GONE'), os.environ['NEW'])"
    programs.run([sys.executable, "-c", code], on_line=lines.append, environment={"GONE": None, "NEW": "x"})
    assert lines == ["None x"]


def test_a_program_ends_with_the_process_that_started_it() -> None:
    code = (
        "import sys; from pipeline.llamacpp.programs import run;"
        "run([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'],"
        " on_line=lambda line: print(line, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    deadline = time.monotonic() + 20
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def test_an_error_in_the_reader_ends_the_program() -> None:
    pids: list[int] = []

    def stop(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        programs.run([sys.executable, "-c", code], on_line=stop)
    assert not psutil.pid_exists(pids[0])


def test_failure_messages(tmp_path: Path) -> None:
    said = ["loading", "", "tensor 'a' is corrupted"]
    assert "exit status 2:\n  loading\n  tensor 'a' is corrupted" in str(programs.failure("it", 2, said))
    assert "ended by SIGKILL (out of memory?)" in str(programs.failure("it", -signal.SIGKILL, []))
    assert "disk is full" in str(programs.failure("it", 1, ["x: No space left on device"]))
    assert "disk is full" in str(programs.failure("it", 1, ["basic_ios::clear: iostream error"], tmp_path))
    assert isinstance(programs.failure("it", 1, []), PipelineError)


def test_space_is_asked_for_before_writing(tmp_path: Path) -> None:
    programs.require_space(tmp_path, 1, "a byte")
    with pytest.raises(PipelineError, match=r"too full for the model: it needs about 1000000000\.0 GB"):
        programs.require_space(tmp_path, 10**18, "the model")

"""Running a program and a server, ending both, and what is said when one fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline import processes
from pipeline.errors import PipelineError


def test_lines_arrive_one_by_one_and_carriage_returns_end_them() -> None:
    code = r"""
import sys
sys.stdout.write("one\rtwo\nthree")
sys.stdout.flush()
sys.stderr.write("\nfour\n")
sys.exit(3)
"""
    lines: list[str] = []
    assert processes.follow([sys.executable, "-c", code], on_line=lines.append) == 3
    assert lines == ["one", "two", "three", "four"]


def test_variables_are_set_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GONE", "1")
    lines: list[str] = []
    code = "import os; print(os.environ.get('GONE'), os.environ['NEW'])"
    processes.follow([sys.executable, "-c", code], on_line=lines.append, environment={"GONE": None, "NEW": "x"})
    assert lines == ["None x"]


def test_a_program_ends_with_the_process_that_started_it() -> None:
    code = (
        "import sys; from pipeline.processes import follow;"
        "follow([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'],"
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
        processes.follow([sys.executable, "-c", code], on_line=stop)
    assert not psutil.pid_exists(pids[0])


def test_failure_messages(tmp_path: Path) -> None:
    said = ["loading", "", "tensor 'a' is corrupted"]
    assert "exit status 2:\n  loading\n  tensor 'a' is corrupted" in str(processes.failure("it", 2, said))
    assert "ended by SIGKILL (out of memory?)" in str(processes.failure("it", -signal.SIGKILL, []))
    assert "disk is full" in str(processes.failure("it", 1, ["x: No space left on device"]))
    assert "disk is full" in str(processes.failure("it", 1, ["basic_ios::clear: iostream error"], tmp_path))
    assert isinstance(processes.failure("it", 1, []), PipelineError)


def test_space_is_asked_for_before_writing(tmp_path: Path) -> None:
    processes.require_space(tmp_path, 1, "a byte")
    with pytest.raises(PipelineError, match=r"too full for the model: it needs about 1\.0 EB"):
        processes.require_space(tmp_path, 10**18, "the model")


def test_a_text_is_read_and_a_child_can_outlive_its_parent() -> None:
    said: list[str] = []
    code = "import sys; print(sys.stdin.read().upper())"
    assert processes.follow([sys.executable, "-c", code], said.append, text="é", ends_with_us=False) == 0
    assert said == ["É"]


def test_a_server_is_waited_for_and_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """One that does not listen to being asked is killed."""
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = processes.start([sys.executable, "-c", code], file)
    assert processes.wait_until(lambda: log.read_text().endswith("\n"), process, 60)
    child = psutil.Process(int(log.read_text()))
    processes.stop(process, seconds=0.1)
    assert process.returncode == -signal.SIGKILL
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    processes.stop(process)  # it has ended: nothing to do


def test_a_server_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        process = processes.start([sys.executable, "-c", "raise SystemExit(3)"], file)
    assert not processes.wait_until(lambda: False, process, 600)
    assert process.wait() == 3


@pytest.mark.parametrize(("told", "most"), [("1", 1), ("1,4", 1), ("100000", None), ("0", None), ("many", None)])
def test_no_more_threads_than_it_is_told(told: str, most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert processes.cores() == (most or len(os.sched_getaffinity(0)))

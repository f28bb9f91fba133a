"""Scripts that run in children of one process: what they print, how they end, and that none sees another."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.llamacpp.scripts import Scripts

SLOW = ("fractions", "wave")  # for these tests it matters only that nothing else has imported one of them


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GONE", "1")
        scripts = Scripts({"GONE": None, "NEW": "x"}, SLOW, gc.disable)
        yield scripts
        scripts.close()


def script(folder: Path, code: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(code, encoding="utf-8")
    return path


def run(scripts: Scripts, *arguments: str | Path) -> tuple[int, list[str]]:
    lines: list[str] = []
    return scripts.run(arguments, lines.append), lines


def test_it_runs_as_it_would_by_itself(scripts: Scripts, tmp_path: Path) -> None:
    script(tmp_path, "WORD = 'beside'", "beside.py")
    path = script(
        tmp_path,
        "import gc, os, sys, beside, wave\n"
        "print(__name__, sys.executable, sys.argv, sys.path[0], beside.WORD, end=' ')\n"
        "print(os.environ.get('GONE'), os.environ['NEW'], gc.isenabled())\n"
        "print(sys.stdin.read() == '', wave.seen if hasattr(wave, 'seen') else 'first')\n"
        "wave.seen = 'again'\n"
        "sys.stderr.write('one\\rtwo\\n\\nthe end')\n"
        "sys.exit(3)\n",
    )
    for _ in range(2):
        status, lines = run(scripts, path, "--two words")
        assert status == 3
        assert lines == [
            f"__main__ {sys.executable} {[str(path), '--two words']} {tmp_path} beside None x False",
            *("True first", "one", "two", "", "the end"),
        ]


@pytest.mark.parametrize(
    ("code", "status", "last"),
    [
        ("", 0, None),
        ("raise ValueError('so it is')", 1, "ValueError: so it is"),
        ("import sys; sys.exit('in words')", 1, "in words"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, None),
    ],
)
def test_how_it_ended_and_the_next_one_runs(
    scripts: Scripts, tmp_path: Path, code: str, status: int, last: str | None
) -> None:
    ended, lines = run(scripts, script(tmp_path, code))
    assert ended == status
    assert (lines[-1] if lines else None) == last
    assert run(scripts, script(tmp_path, "print('next')")) == (0, ["next"])


def test_an_error_in_the_reader_ends_the_script(scripts: Scripts, tmp_path: Path) -> None:
    pids: list[int] = []

    def stop(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    path = script(tmp_path, "import os, time; print(os.getpid()); time.sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        scripts.run([path], stop)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pids[0]).wait(20)
    assert run(scripts, script(tmp_path, "print('next')")) == (0, ["next"])


def test_a_child_of_this_process_ends_no_script_of_it(scripts: Scripts, tmp_path: Path) -> None:
    first = script(tmp_path, "import os; print(os.getppid())")
    _, before = run(scripts, first)
    child = os.fork()
    if child == 0:
        scripts.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run(scripts, first) == (0, before)


def test_a_child_that_stays_does_not_hold_up_the_end(scripts: Scripts, tmp_path: Path) -> None:
    run(scripts, script(tmp_path, ""))
    child = os.fork()
    if child == 0:
        signal.pause()
    signal.alarm(60)  # ends this test, should it wait for the child
    assert scripts.close() == 0
    signal.alarm(0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_killed_process_is_told_and_started_anew(scripts: Scripts, tmp_path: Path) -> None:
    path = script(tmp_path, "import os, signal; os.kill(os.getppid(), signal.SIGKILL)\nimport time; time.sleep(600)")
    assert run(scripts, path)[0] == -signal.SIGKILL
    assert run(scripts, script(tmp_path, "print('next')")) == (0, ["next"])


def test_a_process_that_has_imported_them_forks_it(tmp_path: Path) -> None:
    path = script(
        tmp_path, "import gc, os, sys; print(os.environ['NEW'], sys.argv[1:], 'wave' in sys.modules, gc.isenabled())"
    )
    code = f"""
import gc, os, psutil, {", ".join(SLOW)}
from pipeline.llamacpp.scripts import Scripts
print("before", end="")
scripts = Scripts({{"NEW": "x"}}, {SLOW}, gc.disable)
scripts.fork()
(forked,) = psutil.Process().children()
os.environ["NEW"] = "y"
for number in "12":
    print(scripts.run([{str(path)!r}, number], print))
assert psutil.Process().children() == [forked]
assert scripts.close() == 0
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == ["beforex ['1'] True False", "0", "x ['2'] True False", "0"]

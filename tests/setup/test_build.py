"""Building: a C++ project of three files goes the way that llama.cpp goes."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.packages import CMAKE, make_source

from pipeline.errors import PipelineError
from pipeline.processes import exclusive
from pipeline.setup import places
from pipeline.setup.build import build_programs
from pipeline.setup.pins import load_pins

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("generator", ["ninja", "make"])
def test_programs_are_built_and_run_wherever_they_are_moved(
    wheels: Path, tmp_path: Path, generator: str, without: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if generator == "make":
        monkeypatch.setenv("PATH", without("ninja"))
    pin = make_source(wheels)
    build_programs(pin, pin.first)
    home = places.source_home(pin)
    assert (home / "source/keep/kept.txt").is_file()
    assert not (home / "source/docs").exists()
    assert not (home / "source/keep/not").exists()
    assert not (home / "bin/tiny-later").exists()
    library = next(home.glob("build/bin/*shared_part*"))
    before = library.stat().st_mtime_ns

    build_programs(pin, pin.later)
    assert library.stat().st_mtime_ns == before, "what the first programs needed was compiled again"
    shutil.rmtree(home / "build")
    moved = shutil.move(home / "bin", tmp_path / "elsewhere")
    answer = subprocess.run([Path(moved) / "tiny-later"], capture_output=True, text=True, check=True)
    assert answer.stdout == "42\n"


def test_what_is_built_is_not_built_again_and_needs_no_network(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = make_source(wheels)
    build_programs(pin, pin.first)
    program = places.source_home(pin) / "bin/tiny-first"
    before = program.stat().st_mtime_ns, program.stat().st_ino
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    build_programs(pin, pin.first)
    assert (program.stat().st_mtime_ns, program.stat().st_ino) == before


def test_build_that_fails_says_what_the_compiler_said(wheels: Path) -> None:
    pin = make_source(wheels, {"vendor/tiny/part.cpp": "int answer() { return nonsense; }\n"})
    with pytest.raises(PipelineError, match=r"(?s)building tiny-first failed.*nonsense.*all of it: .*\.log"):
        build_programs(pin, pin.first)
    assert not (places.source_home(pin) / "bin").exists()


def test_instruction_set_names_the_build(cache: Path) -> None:
    assert re.fullmatch(r"\w+-[0-9a-f]{8}", places.instruction_set())
    pin = load_pins().llama_cpp
    assert places.source_home(pin) != places.source_home(replace(pin, cmake=()))


SLOW = """
add_custom_command(OUTPUT slow.txt COMMAND sleep 3 COMMAND ${CMAKE_COMMAND} -E touch slow.txt)
add_custom_target(slow ALL DEPENDS slow.txt)
add_dependencies(shared_part slow)
"""


def test_killed_set_up_is_continued_after_its_compiler_has_ended(wheels: Path, cache: Path, tmp_path: Path) -> None:
    pin = make_source(wheels, {"vendor/tiny/CMakeLists.txt": CMAKE + SLOW})
    code = (
        "from pathlib import Path\n"
        "from pipeline.setup.build import SourcePin, build_programs\n"
        "from pipeline.processes import exclusive\n"
        f"with exclusive(Path({str(cache)!r}) / 'lock') as lock:\n"
        f"    build_programs({pin!r}, ['tiny-first'], [lock])\n"
    )
    command = [sys.executable, "-c", code]
    log = cache / "logs" / "building-tiny-first.log"
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "waiting for another `pipeline setup`" in second.stderr
    programs = list(cache.glob("llama.cpp-1.0-*/bin/tiny-first"))
    assert len(programs) == 1


def test_two_set_ups_exclude_each_other(cache: Path) -> None:
    code = (
        "from pathlib import Path; from pipeline.processes import exclusive\n"
        f"with exclusive(Path({str(cache)!r}) / 'lock'): print('got it', flush=True)"
    )
    with exclusive(cache / "lock"):
        other = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert other.stderr is not None
        assert "waiting for another" in other.stderr.readline()
        assert other.poll() is None
    output, _ = other.communicate(timeout=30)
    assert output == "got it\n"

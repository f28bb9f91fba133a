"""make and the wheel."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from support.packages import NO_NETWORK

ROOT = Path(__file__).parents[2]


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    program = shutil.which("make")
    assert program is not None
    return subprocess.run(
        [program, *arguments],
        cwd=folder,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_alone_prints_its_targets(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    answer = make(tmp_path)
    assert answer.returncode == 0
    listed = re.findall(r"^  make (\w+)", answer.stdout, re.M)
    assert listed == ["help", "setup", "all", "test", "lint", "clean"]
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]


def test_make_without_a_fitting_python_says_which(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("sh", "echo", "test"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    old = tmp_path / "bin" / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    answer = make(tmp_path, "setup", PATH=str(tmp_path / "bin"))
    assert answer.returncode == 2
    assert "no Python 3.11 to 3.14 with the venv module is on PATH" in answer.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_mends_an_environment_without_pip_and_says_once_that_there_is_no_network(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    answer = make(tmp_path, "setup", **NO_NETWORK)
    assert answer.returncode == 2
    assert (tmp_path / ".venv" / "bin" / "pip").exists()
    said = [line for line in answer.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert re.match(r"error: pip cannot install this program: ERROR: .*hatchling.* needs the network", said[0])


def test_make_passes_a_configuration_whose_name_has_a_space(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    answer = make(tmp_path, "--dry-run", "all", "CONFIG=my data/pipeline.toml")
    assert 'run "my data/pipeline.toml"' in answer.stdout


def test_wheel_carries_all_that_the_program_reads_and_runs_from_where_it_is_installed(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = list((ROOT / "pipeline").rglob("*.py"))
    named = {name for path in modules for name in re.findall(r'resource\("([^"]+)"\)', path.read_text())}
    assert named >= {"templates/report.html.j2", "third_party/pins.toml", "requirements.lock"}
    assert {f"pipeline/{name}" for name in named} <= inside
    assert {str(path.relative_to(ROOT)) for path in modules} <= inside

    target = tmp_path / "installed"
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--offline", "--no-deps", "--python", sys.executable]
    subprocess.run([*install, "--target", target, wheel], check=True, capture_output=True)

    def python(*arguments: str) -> str:
        answer = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(target)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    example = target / "pipeline" / "examples" / "home"
    assert f'train = "{example / "train.jsonl"}"' in python("-m", "pipeline", "config", str(example / "pipeline.toml"))
    program = (
        "import sys; from pipeline.resources import resource; from pipeline.setup.pins import pins; "
        "assert pins(); print(*map(resource, sys.argv[1:]), sep='\\n')"
    )
    read = python("-c", program, *sorted(named)).splitlines()
    assert read == [str(target / "pipeline" / name) for name in sorted(named)]

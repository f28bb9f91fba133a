"""make and the wheel: what they bring into an environment, whatever is there."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.packages import NO_NETWORK, make_wheel

from pipeline.setup import libraries

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


def copy_of_the_checkout(folder: Path) -> Path:
    """Every file that git knows or would add, elsewhere."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            target = folder / "checkout" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    return folder / "checkout"


def test_make_alone_prints_its_targets(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    answer = make(tmp_path)
    assert answer.returncode == 0
    listed = re.findall(r"^  make (\w+)", answer.stdout, re.M)
    assert listed == ["help", "setup", "all", "test", "lint", "docs", "lock", "clean"]
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]


def test_make_without_a_fitting_python_says_which(tmp_path: Path) -> None:
    checkout = copy_of_the_checkout(tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("sh", "echo", "test"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    old = tmp_path / "bin" / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    answer = make(checkout, "setup", PATH=str(tmp_path / "bin"))
    assert answer.returncode == 2
    assert "no Python 3.11 to 3.14 with the venv module is on PATH" in answer.stderr
    assert not (checkout / ".venv").exists()


def test_make_mends_an_environment_without_pip_and_says_once_that_there_is_no_network(tmp_path: Path) -> None:
    checkout = copy_of_the_checkout(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    answer = make(checkout, "setup", PIP_NO_CACHE_DIR="1", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="", **NO_NETWORK)
    assert answer.returncode == 2
    assert (checkout / ".venv" / "bin" / "pip").exists()
    assert answer.stderr.count("error: ") == 1
    assert re.search(r"error: fetching uv: .*cannot be reached", answer.stderr)
    assert "Traceback" not in answer.stderr


def test_make_passes_a_configuration_whose_name_has_a_space(tmp_path: Path) -> None:
    answer = make(copy_of_the_checkout(tmp_path), "--dry-run", "all", "CONFIG=my data/pipeline.toml")
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
    inside |= {str(folder) for name in inside for folder in Path(name).parents}
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


def other_versions(environment: Path, wheels: Path) -> set[str]:
    """Put another version of every package of the command line into an environment, and one that is none of ours."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]} - {"pip"}
    for name in (*names, "none-of-ours"):
        make_wheel(wheels, name, "0.0.1")
    # Real ones too, which load, and of which the files are others.
    real = ["certifi==2025.1.31", "click==8.2.0", "rich==14.0.0", "idna==3.10"]
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
    fake = [wheel for wheel in wheels.glob("*.whl") if not wheel.name.startswith(("click-", "rich-"))]
    subprocess.run([*pip, *fake, *real], check=True, capture_output=True)
    return names


def judged(environment: Path) -> dict[str, str | None]:
    return libraries.differences(libraries.locked(), libraries.Environment(environment), "auto")


@pytest.mark.usefixtures("index")
def test_make_and_the_wheel_end_with_exactly_the_lock_whatever_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # what is compiled is seen in test_libraries.py
    checkout = copy_of_the_checkout(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", checkout / ".venv"], check=True)
    names = other_versions(checkout / ".venv", tmp_path / "wheels")
    before = judged(checkout / ".venv")
    assert names <= before.keys()
    assert before["certifi"] == "2025.1.31"
    assert before["httpx"] == "0.0.1 of somebody's own"  # of a file, not of an index
    answer = make(checkout, "setup")
    assert answer.returncode == 0, answer.stderr
    assert judged(checkout / ".venv") == {}
    there = {package.name: package for package in libraries.Environment(checkout / ".venv").installed()}
    assert there["none-of-ours"].version == "0.0.1"
    assert there["finetune-pipeline"].finished
    # Nothing else came in: what is there is of the lock, this program, or was there before.
    known = {canonicalize_name(pin.name) for pin in libraries.locked()}
    assert there.keys() - known <= {"finetune-pipeline", "none-of-ours", "setuptools"}

    # Half of an installation, so that the command line itself cannot start: the same command mends it.
    packages = there["click"].folder.parent
    shutil.rmtree(packages / "click")
    shutil.rmtree(packages / "packaging")
    (there["pydantic"].folder / "RECORD").unlink()
    answer = make(checkout, "setup")
    assert answer.returncode == 0, answer.stderr
    assert judged(checkout / ".venv") == {}
    answer = make(checkout, "setup")
    assert re.fullmatch(r"set up: .*\n", answer.stderr)

    # The wheel in place of the checkout, with what pip takes today: its own command goes back to the lock.
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    programs = checkout / ".venv" / "bin"
    install = [programs / "python", "-m", "pip", "install", "--quiet", wheel, "httpx==0.28.0", "rich==14.0.0"]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True)
    assert judged(checkout / ".venv").keys() >= {"httpx", "rich"}
    command = [programs / "pipeline", "setup"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert judged(checkout / ".venv") == {}
    doctor = subprocess.run([*command[:1], "doctor"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert doctor.returncode == 0, doctor.stdout

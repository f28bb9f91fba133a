"""The locks: complete, with hashes, for every Python; and what changes when they are made anew."""

import hashlib
import re
import shutil
import tomllib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.packages import make_wheel

from pipeline.errors import PipelineError
from pipeline.setup import libraries
from pipeline.setup.lock import changes, lock, main
from pipeline.setup.pins import load_pins, pins

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK_TEXT = (ROOT / "requirements.lock").read_text()
LOCK = libraries.read_lock(LOCK_TEXT)


def environment_of(python: str) -> dict[str, str]:
    return {
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
        "extra": "",
    }


def wanted_requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_lock_satisfies_every_requirement_of_the_project(python: str) -> None:
    place = environment_of(python)
    locked = {canonicalize_name(pin.name): pin.version for pin in LOCK if Marker(pin.marker).evaluate(place)}
    wrong = [
        str(wanted)
        for wanted in wanted_requirements()
        if not wanted.specifier.contains(locked.get(canonicalize_name(wanted.name), "0"), prereleases=True)
    ]
    assert not wrong, f"requirements.lock is behind pyproject.toml; its second line says how it is made: {wrong}"


def test_lock_is_complete_for_what_its_packages_require() -> None:
    options = PYPROJECT["tool"]["uv"]
    free = {canonicalize_name(Requirement(text).name) for text in options["override-dependencies"]}
    absent = {canonicalize_name(name) for name in options["exclude-dependencies"]}
    locked = {canonicalize_name(pin.name): pin.version for pin in libraries.applicable(LOCK)}
    wrong = []
    for name in locked:
        try:
            needs = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue  # torch's CPU build is here, which needs no CUDA library
        for need in needs:
            wanted = canonicalize_name(need.name)
            if wanted in free | absent or (need.marker and not need.marker.evaluate({"extra": ""})):
                continue
            if not need.specifier.contains(locked.get(wanted, "0"), prereleases=True):
                wrong.append(f"{name} wants {need}, locked is {locked.get(wanted)}")
    assert not wrong
    assert not absent & set(locked)


def test_lock_has_hashes_and_names_no_host() -> None:
    assert all("--hash=sha256:" in pin.text for pin in LOCK)
    assert "://" not in LOCK_TEXT
    # Wheels for more than one Python and processor.
    torch = next(pin for pin in LOCK if pin.name == "torch")
    assert torch.text.count("--hash=") >= 8


def test_lock_is_refused_where_it_has_nothing() -> None:
    elsewhere = [replace(pin, marker="sys_platform == 'win32'") for pin in LOCK[:3]]
    with pytest.raises(PipelineError, match=r"has nothing for Python 3\.\d+"):
        libraries.applicable(elsewhere)


def test_pins_and_code_name_no_host() -> None:
    for path in [
        ROOT / "third_party" / "pins.toml",
        ROOT / "Makefile",
        *(ROOT / "pipeline" / "setup").glob("*.py"),
    ]:
        assert "://" not in path.read_text(), path


def test_pins_in_force_are_in_the_manifest_form() -> None:
    known = pins()
    assert known["llama.cpp"]["sha256"] == load_pins().llama_cpp.sha256
    assert known["requirements.lock"]["sha256"] == hashlib.sha256(LOCK_TEXT.encode()).hexdigest()
    assert set(known) == {"requirements.lock", "llama.cpp", "ollama", "packaged base"}


def test_bootstrap_lock_is_of_the_versions_and_hashes_of_the_lock() -> None:
    whole = {pin.name: pin for pin in LOCK}
    first = libraries.read_lock((ROOT / "third_party" / "bootstrap.lock").read_text())
    assert {pin.name for pin in first} == {"packaging", "uv"}
    for pin in first:
        assert pin.version == whole[pin.name].version
        assert re.findall(r"sha256:\w+", pin.text) == re.findall(r"sha256:\w+", whole[pin.name].text)


def test_what_changed_is_told_by_package() -> None:
    before = "one==1.0 \\\n    --hash=sha256:0\ntwo==2.0 \\\n    --hash=sha256:0\nsame==1 \\\n    --hash=sha256:0\n"
    after = "one==1.1 \\\n    --hash=sha256:1\nthree==3.0 \\\n    --hash=sha256:0\nsame==1 \\\n    --hash=sha256:0\n"
    assert changes(before, after) == ["one 1.0 -> 1.1", "three (new) -> 3.0", "two 2.0 -> (gone)"]
    assert changes(before, before) == []
    # A wheel more, or another marker, is a change as well.
    assert changes(before, before.replace("sha256:0", "sha256:2", 1)) == ["one 1.0: other files, or for other systems"]


@pytest.mark.usefixtures("index")
def test_lock_is_made_anew_and_says_what_changed(tmp_path: Path) -> None:
    (tmp_path / "third_party").mkdir()
    for name in ("pyproject.toml", "requirements.lock", "third_party/bootstrap.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    older = LOCK_TEXT.replace("\nclick==", "\nclick==0.0.1+was.")
    (tmp_path / "requirements.lock").write_text(older)
    found = lock(tmp_path)
    assert any(line.startswith("click 0.0.1+was.") for line in found)
    text = (tmp_path / "requirements.lock").read_text()
    assert "://" not in text
    assert "make lock" in text.splitlines()[1]
    made = {pin.name: pin.version for pin in libraries.read_lock(text)}
    # What the project pins is as it was; all of it has hashes, and set-up's own first packages are of it.
    assert made["unsloth"] == next(pin.version for pin in LOCK if pin.name == "unsloth")
    assert all("--hash=sha256:" in pin.text for pin in libraries.read_lock(text))
    for pin in libraries.read_lock((tmp_path / "third_party" / "bootstrap.lock").read_text()):
        assert pin.version == made[pin.name]


def test_make_lock_tells_what_changed_and_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "third_party").mkdir()
    for name in ("requirements.lock", "third_party/bootstrap.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    project = '[project]\nname = "x"\nversion = "1"\ndependencies = ["one", "packaging", "uv"]\n'
    project += '[tool.uv]\nexclude-dependencies = ["two"]\n'
    (tmp_path / "pyproject.toml").write_text(project)
    wheels = tmp_path / "wheels"
    for name in ("one", "packaging", "uv"):
        make_wheel(wheels, name, "1.0")
    monkeypatch.setattr("pipeline.setup.lock.checkout", lambda: tmp_path)
    monkeypatch.setenv("UV_FIND_LINKS", str(wheels))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    # What the user has configured about versions counts for nothing.
    (tmp_path / "config" / "uv").mkdir(parents=True)
    (tmp_path / "config" / "uv" / "uv.toml").write_text('override-dependencies = ["one==7"]\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert main() == 0
    said = capsys.readouterr().out.splitlines()
    assert "one (new) -> 1.0" in said
    assert any(line.startswith("torch ") and line.endswith("-> (gone)") for line in said)
    assert said[-1].startswith("`make setup` installs it")
    assert main() == 0
    assert capsys.readouterr().out == "nothing changed\n"
    (tmp_path / "pyproject.toml").write_text(project.replace('"one"', '"nowhere"'))
    assert main() == 1
    assert capsys.readouterr().err.startswith("error: resolving requirements.lock")


def test_lock_that_cannot_be_resolved_changes_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requirements.lock").write_text("as it was")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1"\ndependencies = ["nowhere==1"]\n')
    monkeypatch.setenv("UV_NO_INDEX", "1")
    with pytest.raises(PipelineError, match=r"(?s)resolving requirements\.lock.*nowhere"):
        lock(tmp_path)
    assert (tmp_path / "requirements.lock").read_text() == "as it was"

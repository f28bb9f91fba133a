"""The environment: filled from the lock whatever is there, and one message for what stands in the way."""

import re
import shutil
from pathlib import Path

import pytest
from support.packages import NO_NETWORK, make_wheel, version_in, write_lock

from pipeline.errors import PipelineError
from pipeline.setup import libraries
from pipeline.setup.machine_findings import OK

ROOT = Path(__file__).parents[2]


def test_environment_is_filled_from_the_lock_and_only_then_complete(
    wheels: Path, environment: libraries.Environment, tmp_path: Path
) -> None:
    first = {"one==1.0": make_wheel(wheels, "one", "1.0"), "two-b==2.0": make_wheel(wheels, "two-b", "2.0")}
    lock_file = write_lock(tmp_path / "lock", {**first, "gone==1 ; sys_platform == 'win32'": "0" * 64})
    lock = libraries.read_lock(lock_file.read_text())
    assert list(libraries.differences(lock, environment, "auto")) == ["one", "two-b"]
    libraries.install(lock_file, environment, "auto")
    assert list(libraries.differences(lock, environment, "auto")) == []
    assert version_in(environment, "two_b") == "2.0"

    # A newer lock makes the environment incomplete, and installing goes to its version.
    newer = write_lock(tmp_path / "lock", {**first, "one==1.1": make_wheel(wheels, "one", "1.1")} | {})
    pinned = newer.read_text().replace(f"one==1.0 \\\n    --hash=sha256:{first['one==1.0']}\n", "")
    newer.write_text(pinned)
    assert list(libraries.differences(libraries.read_lock(pinned), environment, "auto")) == ["one"]
    libraries.install(newer, environment, "auto")
    assert version_in(environment, "one") == "1.1"


def test_libraries_are_compiled_unless_python_is_told_to_write_none(
    wheels: Path, environment: libraries.Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_file = write_lock(tmp_path / "lock", {"one==1.0": make_wheel(wheels, "one", "1.0")})
    libraries.install(lock_file, environment, "auto")
    (folder,) = (package.folder.parent for package in environment.installed() if package.name == "one")
    with monkeypatch.context() as told:
        told.setenv("PYTHONDONTWRITEBYTECODE", "1")
        libraries.compile_libraries(environment)
    assert not list(folder.rglob("*.pyc"))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    libraries.compile_libraries(environment)
    assert list(folder.rglob("*.pyc"))


def test_package_whose_installation_was_cut_off_is_installed_again(
    wheels: Path, environment: libraries.Environment, tmp_path: Path
) -> None:
    lock_file = write_lock(tmp_path / "lock", {"one==1.0": make_wheel(wheels, "one", "1.0")})
    lock = libraries.read_lock(lock_file.read_text())
    libraries.install(lock_file, environment, "auto")
    (info,) = environment.prefix.glob("lib/*/site-packages/one-1.0.dist-info")
    (info / "INSTALLER").unlink()
    (info.parent / "one.py").unlink()
    assert list(libraries.differences(lock, environment, "auto")) == ["one"]
    libraries.install(lock_file, environment, "auto")
    assert list(libraries.differences(lock, environment, "auto")) == []
    assert version_in(environment, "one") == "1.0"


def test_wheel_with_another_hash_is_not_installed(
    wheels: Path, environment: libraries.Environment, tmp_path: Path
) -> None:
    make_wheel(wheels, "one", "1.0", "VERSION = 'tampered'\n")
    lock_file = write_lock(tmp_path / "lock", {"one==1.0": "0" * 64})
    with pytest.raises(PipelineError, match="wrong hash"):
        libraries.install(lock_file, environment, "auto")
    assert version_in(environment, "one") is None


def torch_lock(wheels: Path, path: Path, *, offered: bool) -> Path:
    if offered:
        make_wheel(wheels, "torch", "9.1+cpu")
    return write_lock(
        path,
        {
            "nvidia-thing==1.0": make_wheel(wheels, "nvidia-thing", "1.0"),
            "cuda-thing==1.0": make_wheel(wheels, "cuda-thing", "1.0"),
            "other==1.0": make_wheel(wheels, "other", "1.0"),
            "torch==9.1": make_wheel(wheels, "torch", "9.1"),
        },
    )


@pytest.mark.parametrize(
    ("offered", "choice", "version"),
    [(True, "auto", "9.1"), (False, "auto", "9.1"), (True, "cpu", "9.1+cpu"), (True, "cuda", "9.1")],
)
def test_cpu_build_of_torch_which_no_lock_names_is_taken_where_it_is_asked_for(
    wheels: Path,
    environment: libraries.Environment,
    tmp_path: Path,
    offered: bool,
    choice: str,
    version: str,
) -> None:
    lock_file = torch_lock(wheels, tmp_path / "lock", offered=offered)
    lock = libraries.read_lock(lock_file.read_text())
    libraries.install(lock_file, environment, choice)
    assert version_in(environment, "torch") == version
    assert version_in(environment, "nvidia_thing") == (None if "cpu" in version else "1.0")
    assert version_in(environment, "other") == "1.0"
    assert list(libraries.differences(lock, environment, "auto")) == []
    assert list(libraries.differences(lock, environment, choice)) == []
    other = "cuda" if "cpu" in version else "cpu"
    assert "torch" in list(libraries.differences(lock, environment, other))


def test_cpu_build_that_is_asked_for_and_not_offered_is_an_error(
    wheels: Path, environment: libraries.Environment, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=r"torch==9\.1\+cpu is not offered"):
        libraries.install(torch_lock(wheels, tmp_path / "lock", offered=False), environment, "cpu")


def test_libraries_without_a_network_say_so(
    cache: Path, environment: libraries.Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    lock_file = write_lock(tmp_path / "lock", {"click==8.1.0": "0" * 64})
    with pytest.raises(PipelineError, match="network cannot be reached"):
        libraries.install(lock_file, environment, "auto")


def pins_of(wheels: Path, *names: str) -> dict[str, str]:
    return {name: make_wheel(wheels, *name.split("==")) for name in names}


def test_whatever_versions_are_there_it_ends_with_exactly_the_lock(
    wheels: Path, environment: libraries.Environment, tmp_path: Path
) -> None:
    older = write_lock(tmp_path / "older", pins_of(wheels, "one==0.9", "two==2.5", "foreign==7.0"))
    libraries.install(older, environment, "auto")
    lock_file = write_lock(tmp_path / "lock", pins_of(wheels, "one==1.0", "two==2.0", "three==3.0"))
    lock = libraries.read_lock(lock_file.read_text())
    assert libraries.differences(lock, environment, "auto") == {"one": "0.9", "two": "2.5", "three": None}
    libraries.install(lock_file, environment, "auto")
    assert libraries.differences(lock, environment, "auto") == {}
    assert [version_in(environment, name) for name in ("one", "two", "three", "foreign")] == [
        "1.0",
        "2.0",
        "3.0",
        "7.0",
    ]


@pytest.mark.parametrize(
    "broken", ["no record", "no installer", "a file is gone", "two of one name", "somebody's own build"]
)
def test_half_of_an_installation_is_found_and_mended(
    wheels: Path, environment: libraries.Environment, tmp_path: Path, broken: str
) -> None:
    lock_file = write_lock(tmp_path / "lock", pins_of(wheels, "one==1.0", "two==2.0"))
    lock = libraries.read_lock(lock_file.read_text())
    libraries.install(lock_file, environment, "auto")
    (info,) = environment.prefix.glob("lib/*/site-packages/one-1.0.dist-info")
    if broken == "no record":
        (info / "RECORD").unlink()
    elif broken == "no installer":
        (info / "INSTALLER").unlink()
    elif broken == "a file is gone":
        (info.parent / "one.py").unlink()
    elif broken == "somebody's own build":
        (info / "direct_url.json").write_text('{"url": "file:///home/me/one", "dir_info": {"editable": true}}')
        (info.parent / "one.py").unlink()  # uv's cache may have the same file
        (info.parent / "one.py").write_text("VERSION = 'mine'\n")
    else:
        other = Path(shutil.copytree(info, info.with_name("one-0.5.dist-info")))
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: one\nVersion: 0.5\n")
    assert libraries.differences(lock, environment, "auto").keys() == {"one"}
    libraries.install(lock_file, environment, "auto")
    assert libraries.differences(lock, environment, "auto") == {}
    assert version_in(environment, "one") == "1.0"


def test_only_the_lock_says_what_is_installed(
    wheels: Path, environment: libraries.Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checkout's configuration, the user's, and variables: each of them would take another version, or none.
    lock_file = write_lock(tmp_path / "lock", pins_of(wheels, "one==1.0"))
    libraries.install(write_lock(tmp_path / "newer", pins_of(wheels, "one==1.1")), environment, "auto")
    overriding = 'override-dependencies = ["one"]\nexclude-newer = "2000-01-01T00:00:00Z"\n'
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "pyproject.toml").write_text(
        f'[project]\nname = "x"\nversion = "1"\n[tool.uv]\n{overriding}'
    )
    (tmp_path / "config" / "uv").mkdir(parents=True)
    (tmp_path / "config" / "uv" / "uv.toml").write_text(overriding)
    (tmp_path / "constraints").write_text("one==1.1\n")
    monkeypatch.chdir(tmp_path / "checkout")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("UV_CONSTRAINT", "UV_OVERRIDE"):
        monkeypatch.setenv(name, str(tmp_path / "constraints"))
    monkeypatch.setenv("UV_EXCLUDE_NEWER", "2000-01-01T00:00:00Z")
    libraries.install(lock_file, environment, "auto")
    assert version_in(environment, "one") == "1.0"


def test_package_that_no_index_has_is_named(wheels: Path, environment: libraries.Environment, tmp_path: Path) -> None:
    wheels.mkdir()
    lock_file = write_lock(tmp_path / "lock", {"nowhere==1.0": "0" * 64})
    with pytest.raises(PipelineError, match=r"(?s)do not have a locked package.*nowhere"):
        libraries.install(lock_file, environment, "auto")


def test_cpu_build_that_was_installed_gives_way_to_the_ordinary_one(
    wheels: Path, environment: libraries.Environment, tmp_path: Path
) -> None:
    lock_file = torch_lock(wheels, tmp_path / "lock", offered=True)
    lock = libraries.read_lock(lock_file.read_text())
    libraries.install(lock_file, environment, "cpu")
    libraries.install(lock_file, environment, "auto")
    assert version_in(environment, "torch") == "9.1+cpu", "where it was asked for once, it stays"
    assert libraries.differences(lock, environment, "cuda").keys() == {"torch", "nvidia-thing", "cuda-thing"}
    libraries.install(lock_file, environment, "cuda")
    assert version_in(environment, "torch") == "9.1"
    assert version_in(environment, "nvidia_thing") == "1.0"
    assert libraries.differences(lock, environment, "cuda") == {}


def test_libraries_of_this_environment_are_judged() -> None:
    finding = libraries.look()
    assert finding.state == OK, finding.sentence
    assert re.match(r"\d+ as locked, in ", finding.found)

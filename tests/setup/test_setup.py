"""Set-up: the lock, the environment, what is fetched and built, and one message for whatever is missing.

The builds here are real but small: a C++ project of three files goes the way that llama.cpp goes.
"""

import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.errors import PipelineError, UserError
from pipeline.ollama.server import new_enough
from pipeline.processes import exclusive, run
from pipeline.resources import cache_folder
from pipeline.setup import libraries, machine, toolchain
from pipeline.setup.build import build_programs, unpacked
from pipeline.setup.fetch import fetch_package, unpack
from pipeline.setup.ollama import build_ollama
from pipeline.setup.pins import PackagePin, SourcePin, load_pins, pins

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK_TEXT = (ROOT / "requirements.lock").read_text()
LOCK = libraries.read_lock(LOCK_TEXT)
# Where `pipeline setup` has put things, before a test names another place.
REAL_CACHE = cache_folder()
# A proxy that nobody answers at: what a machine without a network looks like to every client.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
NO_NETWORK = {
    **dict.fromkeys(PROXIES, "http://127.0.0.1:9"),
    "PIP_RETRIES": "0",
    "UV_HTTP_RETRIES": "0",
    "NO_PROXY": "",
    "no_proxy": "",
}


# ---- the lock ------------------------------------------------------------------------------------


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


# ---- the environment -----------------------------------------------------------------------------


def make_wheel(folder: Path, name: str, version: str, code: str = "") -> str:
    """A wheel with one module; returns its hash."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{module}.py": code or f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n"
        for path, text in files.items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheels(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that this machine is configured for, the way people do it: for pip."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    for name in ("UV_FIND_LINKS", "UV_NO_INDEX", "UV_INDEX", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "wheels"


@pytest.fixture
def environment(tmp_path: Path) -> libraries.Environment:
    subprocess.run(
        [sys.executable, "-m", "uv", "venv", "-q", "--python", sys.executable, tmp_path / "venv"], check=True
    )
    return libraries.Environment(tmp_path / "venv")


def write_lock(path: Path, pinned: dict[str, str]) -> Path:
    path.write_text("".join(f"{name} \\\n    --hash=sha256:{digest}\n" for name, digest in pinned.items()))
    return path


def version_in(environment: libraries.Environment, module: str) -> str | None:
    code = f"import importlib.util as u; print(u.find_spec({module!r}) and __import__({module!r}).VERSION)"
    answer = subprocess.run([environment.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return None if answer == "None" else answer


def test_environment_is_filled_from_the_lock_and_only_then_complete(
    wheels: Path, environment: libraries.Environment, tmp_path: Path
) -> None:
    first = {"one==1.0": make_wheel(wheels, "one", "1.0"), "two-b==2.0": make_wheel(wheels, "two-b", "2.0")}
    lock_file = write_lock(tmp_path / "lock", {**first, "gone==1 ; sys_platform == 'win32'": "0" * 64})
    lock = libraries.read_lock(lock_file.read_text())
    assert libraries.missing(lock, environment, "auto") == ["one", "two-b"]
    libraries.install(lock_file, environment, "auto", nvidia_driver=False)
    assert libraries.missing(lock, environment, "auto") == []
    assert version_in(environment, "two_b") == "2.0"

    # A newer lock makes the environment incomplete, and installing goes to its version.
    newer = write_lock(tmp_path / "lock", {**first, "one==1.1": make_wheel(wheels, "one", "1.1")} | {})
    pinned = newer.read_text().replace(f"one==1.0 \\\n    --hash=sha256:{first['one==1.0']}\n", "")
    newer.write_text(pinned)
    assert libraries.missing(libraries.read_lock(pinned), environment, "auto") == ["one"]
    libraries.install(newer, environment, "auto", nvidia_driver=False)
    assert version_in(environment, "one") == "1.1"


def test_package_whose_installation_was_cut_off_is_installed_again(
    wheels: Path, environment: libraries.Environment, tmp_path: Path
) -> None:
    lock_file = write_lock(tmp_path / "lock", {"one==1.0": make_wheel(wheels, "one", "1.0")})
    lock = libraries.read_lock(lock_file.read_text())
    libraries.install(lock_file, environment, "auto", nvidia_driver=False)
    (info,) = environment.prefix.glob("lib/*/site-packages/one-1.0.dist-info")
    (info / "INSTALLER").unlink()
    (info.parent / "one.py").unlink()
    assert libraries.missing(lock, environment, "auto") == ["one"]
    libraries.install(lock_file, environment, "auto", nvidia_driver=False)
    assert libraries.missing(lock, environment, "auto") == []
    assert version_in(environment, "one") == "1.0"


def test_wheel_with_another_hash_is_not_installed(
    wheels: Path, environment: libraries.Environment, tmp_path: Path
) -> None:
    make_wheel(wheels, "one", "1.0", "VERSION = 'tampered'\n")
    lock_file = write_lock(tmp_path / "lock", {"one==1.0": "0" * 64})
    with pytest.raises(PipelineError, match="wrong hash"):
        libraries.install(lock_file, environment, "auto", nvidia_driver=False)
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
    ("offered", "driver", "choice", "version"),
    [
        (True, False, "auto", "9.1+cpu"),
        (False, False, "auto", "9.1"),
        (True, True, "auto", "9.1"),
        (True, True, "cpu", "9.1+cpu"),
        (True, False, "cuda", "9.1"),
    ],
)
def test_cpu_build_of_torch_is_taken_where_one_is_offered_and_no_gpu_is_there(
    wheels: Path,
    environment: libraries.Environment,
    tmp_path: Path,
    offered: bool,
    driver: bool,
    choice: str,
    version: str,
) -> None:
    lock_file = torch_lock(wheels, tmp_path / "lock", offered=offered)
    lock = libraries.read_lock(lock_file.read_text())
    libraries.install(lock_file, environment, choice, nvidia_driver=driver)
    assert version_in(environment, "torch") == version
    assert version_in(environment, "nvidia_thing") == (None if "cpu" in version else "1.0")
    assert version_in(environment, "other") == "1.0"
    assert libraries.missing(lock, environment, "auto") == []
    assert libraries.missing(lock, environment, choice) == []
    other = "cuda" if "cpu" in version else "cpu"
    assert "torch" in libraries.missing(lock, environment, other)


def test_cpu_build_that_is_asked_for_and_not_offered_is_an_error(
    wheels: Path, environment: libraries.Environment, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=r"torch 9\.1\+cpu is not offered"):
        libraries.install(torch_lock(wheels, tmp_path / "lock", offered=False), environment, "cpu", nvidia_driver=False)


def test_libraries_without_a_network_say_so(
    cache: Path, environment: libraries.Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    lock_file = write_lock(tmp_path / "lock", {"click==8.1.0": "0" * 64})
    with pytest.raises(PipelineError, match="network cannot be reached"):
        libraries.install(lock_file, environment, "auto", nvidia_driver=False)


# ---- fetching ------------------------------------------------------------------------------------

BACKEND = """
import pathlib, tarfile
METADATA = "Metadata-Version: 2.1\\nName: tiny-tools\\nVersion: 1.0\\n"
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "tiny_tools-1.0.dist-info"); info.mkdir()
    (info / "METADATA").write_text(METADATA)
    return info.name
def build_wheel(*args, **kwargs): raise SystemExit("never built")
"""
CMAKE = """
cmake_minimum_required(VERSION 3.14)
project(tiny CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(shared_part SHARED part.cpp)
foreach(name tiny-first tiny-later)
    add_executable(${name} main.cpp)
    target_link_libraries(${name} shared_part)
endforeach()
"""
PROJECT = {
    "vendor/tiny/CMakeLists.txt": CMAKE,
    "vendor/tiny/part.cpp": "int answer() { return 42; }\n",
    "vendor/tiny/main.cpp": '#include <stdio.h>\nint answer();\nint main() { printf("%d\\n", answer()); }',
    "vendor/tiny/docs/long.md": "not needed\n",
    "vendor/tiny/keep/kept.txt": "needed\n",
    "vendor/tiny/keep/not/this.txt": "not needed\n",
    "README.md": "not needed\n",
    "backend.py": BACKEND,
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-tools\nVersion: 1.0\n",
}


def make_source(folder: Path, changes: dict[str, str] | None = None) -> SourcePin:
    """A source distribution that carries a C++ project, and its pin."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "tiny_tools-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path, text in {**PROJECT, **(changes or {})}.items():
            member = tarfile.TarInfo(f"tiny_tools-1.0/{path}")
            member.size, member.mtime = len(text.encode()), 1_700_000_000
            tar.addfile(member, io.BytesIO(text.encode()))
    return SourcePin(
        package="tiny-tools",
        version="1.0",
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        commit="",
        folder="vendor/tiny",
        keep=("CMakeLists.txt", "part.cpp", "main.cpp", "keep"),
        leave=("keep/not",),
        cmake=("-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"),
        first=("tiny-first",),
        later=("tiny-later",),
    )


def test_fetching_checks_the_hash_and_happens_once(
    wheels: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin, target = make_source(wheels), tmp_path / "got" / "tiny.tar.gz"
    assert hashlib.sha256(fetch_package(pin, target, source=True).read_bytes()).hexdigest() == pin.sha256
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    fetch_package(pin, target, source=True)
    assert [path.name for path in target.parent.iterdir()] == ["tiny.tar.gz"]


def test_fetching_something_else_than_the_pin_is_refused(wheels: Path, tmp_path: Path) -> None:
    pin, target = replace(make_source(wheels), sha256="0" * 64), tmp_path / "got" / "tiny.tar.gz"
    with pytest.raises(PipelineError, match="another hash than sha256:0000"):
        fetch_package(pin, target, source=True)
    assert list(target.parent.iterdir()) == []


def test_archive_that_changed_on_disk_is_refused(wheels: Path, cache: Path) -> None:
    pin = make_source(wheels)
    archive = fetch_package(pin, cache / "downloads" / "tiny_tools-1.0.tar.gz", source=True)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    with pytest.raises(PipelineError, match=r"wrong hash for tiny-tools 1\.0: .* delete the file"):
        unpacked(pin)
    assert toolchain.source_home(pin).exists() is False


def test_fetching_without_a_network_says_so(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError, match=r"cannot be reached"):
        fetch_package(PackagePin("click", "8.1.0", "0" * 64), tmp_path / "got" / "x.whl", source=False)


def test_archive_that_names_a_place_outside_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("top/../../escaped"), io.BytesIO(b""))
    with pytest.raises(PipelineError, match="outside of itself"):
        unpack(tmp_path / "bad.tar.gz", tmp_path / "a" / "b", lambda path: path)
    assert not (tmp_path / "escaped").exists()


def test_damaged_archive_is_one_message(tmp_path: Path) -> None:
    make_source(tmp_path)
    whole = (tmp_path / "tiny_tools-1.0.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PipelineError, match=r"cut\.tar\.gz: damaged"):
        unpack(tmp_path / "cut.tar.gz", tmp_path / "tree", lambda path: path)


# ---- building ------------------------------------------------------------------------------------


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., str]:
    """A PATH on which everything is found but the programs named."""

    def path(*names: str) -> str:
        folder = tmp_path / f"path-without-{'-'.join(names)}"
        folder.mkdir()
        for place in reversed(os.environ["PATH"].split(os.pathsep)):
            for program in Path(place).iterdir() if Path(place).is_dir() else ():
                hidden = any(re.fullmatch(rf"{re.escape(name)}(-?[\d.]+)?", program.name) for name in names)
                if not hidden and not (folder / program.name).is_symlink():
                    (folder / program.name).symlink_to(program)
        return str(folder)

    return path


@pytest.mark.parametrize("generator", ["ninja", "make"])
def test_programs_are_built_and_run_wherever_they_are_moved(
    wheels: Path, tmp_path: Path, generator: str, without: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if generator == "make":
        monkeypatch.setenv("PATH", without("ninja"))
    pin = make_source(wheels)
    build_programs(pin, pin.first)
    home = toolchain.source_home(pin)
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
    program = toolchain.source_home(pin) / "bin/tiny-first"
    before = program.stat().st_mtime_ns, program.stat().st_ino
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    build_programs(pin, pin.first)
    assert (program.stat().st_mtime_ns, program.stat().st_ino) == before


def test_build_that_fails_says_what_the_compiler_said(wheels: Path) -> None:
    pin = make_source(wheels, {"vendor/tiny/part.cpp": "int answer() { return nonsense; }\n"})
    with pytest.raises(PipelineError, match=r"(?s)building tiny-first failed.*nonsense.*all of it: .*\.log"):
        build_programs(pin, pin.first)
    assert not (toolchain.source_home(pin) / "bin").exists()


def test_instruction_set_names_the_build(cache: Path) -> None:
    assert re.fullmatch(r"\w+-[0-9a-f]{8}", toolchain.instruction_set())
    pin = load_pins().llama_cpp
    assert toolchain.source_home(pin) != toolchain.source_home(replace(pin, cmake=()))


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


# ---- the disk ------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    machine.require_space({tmp_path: 1.0, tmp_path / "not" / "there": 1.0})
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(PipelineError, match=r"needs about [\d.,]+ GiB on this disk, [\d.]+ are free"):
        # Each half would fit.
        machine.require_space({tmp_path: 0.9 * free, tmp_path / "not" / "there": 0.9 * free})


def test_disk_that_fills_while_unpacking_is_one_message(wheels: Path, tmp_path: Path) -> None:
    make_source(wheels, {"vendor/tiny/keep/big": "x" * 1_000_000})
    code = (
        "import resource, sys; from pathlib import Path; from pipeline.setup.fetch import unpack\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"archive, tree = Path({str(wheels / 'tiny_tools-1.0.tar.gz')!r}), Path({str(tmp_path / 'tree')!r})\n"
        "unpack(archive, tree, lambda path: path)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.stderr.splitlines()[-1].startswith("pipeline.errors.PipelineError: ")
    assert "the disk is full; free some space" in answer.stderr.splitlines()[-1]


def test_disk_that_fills_in_a_program_is_one_message(cache: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    code = "import sys; open('/dev/full', 'w').write('x' * 100_000)"
    with pytest.raises(PipelineError, match="testing: the disk is full"):
        run([sys.executable, "-c", code], "testing")


def test_cache_that_cannot_be_written_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(PipelineError, match=r"PIPELINE_CACHE"), exclusive(toolchain.downloads() / "lock"):
        pass
    monkeypatch.setenv("PIPELINE_CACHE", "~no-such-user/cache")
    with pytest.raises(UserError, match="PIPELINE_CACHE: ~no-such-user/cache: the home folder of this user"):
        cache_folder()


# ---- the command ---------------------------------------------------------------------------------


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
    built = toolchain.source_home(pins_here.llama_cpp).name
    wheel = toolchain.package_file(pins_here.packaged_base)
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
    assert "warning: there is neither Go nor an Ollama" in answer.stderr
    assert "With Go installed, `pipeline setup` builds Ollama" in answer.stderr


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
    assert ("neither Go nor" in answer.stderr) is not used
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
    folder, source = toolchain.llamacpp_folder(), toolchain.llamacpp_source()
    assert folder is not None
    assert source is not None
    known = load_pins()
    answer = subprocess.run([folder / "llama-server", "--version"], capture_output=True, text=True, check=True)
    assert known.llama_cpp.commit in answer.stdout + answer.stderr
    for name in (*known.llama_cpp.first, *known.llama_cpp.later):
        assert (folder / name).is_file()
    for path in ("convert_hf_to_gguf.py", "gguf-py/gguf", "conversion", "models/templates"):
        assert (source / path).exists()
    program = toolchain.ollama_program()
    if program is not None:
        asked = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        assert known.ollama.version in asked.stdout
        beside = program.parents[1] / "lib" / "ollama" / "llama-server"
        assert subprocess.run([beside, "--version"], capture_output=True, check=False).returncode == 0


# ---- make and the wheel --------------------------------------------------------------------------


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

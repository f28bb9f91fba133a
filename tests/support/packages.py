"""Packages that tests make: wheels, locks, a C++ project as a source distribution; a machine without a network."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

from pipeline.setup.libraries import Environment
from pipeline.setup.pins import SourcePin

# A proxy that nobody answers at: what a machine without a network looks like to every client.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
NO_NETWORK = {
    **dict.fromkeys(PROXIES, "http://127.0.0.1:9"),
    "PIP_RETRIES": "0",
    "UV_HTTP_RETRIES": "0",
    "NO_PROXY": "",
    "no_proxy": "",
}


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


def write_lock(path: Path, pinned: dict[str, str]) -> Path:
    path.write_text("".join(f"{name} \\\n    --hash=sha256:{digest}\n" for name, digest in pinned.items()))
    return path


def version_in(environment: Environment, module: str) -> str | None:
    code = f"import importlib.util as u; print(u.find_spec({module!r}) and __import__({module!r}).VERSION)"
    answer = subprocess.run([environment.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return None if answer == "None" else answer


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

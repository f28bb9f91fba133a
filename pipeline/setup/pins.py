"""third_party/pins.toml as typed values: which package, which version, which hash."""

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.resources import resource, sha256_of


@dataclass(frozen=True)
class PackagePin:
    """A file of a Python package index: `sha256` is that of the wheel or source distribution."""

    package: str
    version: str
    sha256: str


@dataclass(frozen=True)
class SourcePin(PackagePin):
    """A source distribution that carries a C++ project.

    Attributes:
        commit: the project's commit.
        folder: where the project lies inside the distribution.
        keep: its files and folders that are unpacked.
        leave: folders inside those that are not.
        cmake: what cmake is configured with.
        first: programs that the main job needs.
        later: programs that are built when those are done.
    """

    commit: str
    folder: str
    keep: tuple[str, ...]
    leave: tuple[str, ...]
    cmake: tuple[str, ...]
    first: tuple[str, ...]
    later: tuple[str, ...]


@dataclass(frozen=True)
class ModulePin:
    """A Go module: `sum` is what go.sum calls h1, `go` the first Go that its go.mod takes."""

    module: str
    version: str
    sum: str
    commit: str
    go: str


@dataclass(frozen=True)
class NodePin:
    """An npm package: `integrity` is npm's own, "sha512-" and base64."""

    package: str
    version: str
    integrity: str


@dataclass(frozen=True)
class Pins:
    """Everything that is pinned beside requirements.lock."""

    llama_cpp: SourcePin
    ollama: ModulePin
    packaged_base: PackagePin
    tokenizers: dict[str, NodePin]


def load_pins(path: Path | None = None) -> Pins:
    """Read the pins: those of this program, or of another file of the same form."""
    table = tomllib.loads((path or resource("third_party/pins.toml")).read_text(encoding="utf-8"))
    return Pins(
        llama_cpp=SourcePin(**_with_tuples(table["llama-cpp"])),
        ollama=ModulePin(**table["ollama"]),
        packaged_base=PackagePin(**table["packaged-base"]),
        tokenizers={name: NodePin(**pin) for name, pin in table.get("tokenizers", {}).items()},
    )


def pins() -> dict[str, Any]:
    """The pins in force, as JSON values for a run's manifest."""
    known = load_pins()
    llama_cpp = {key: value for key, value in asdict(known.llama_cpp).items() if key in _IN_MANIFEST}
    return {
        "requirements.lock": {"sha256": sha256_of(resource("requirements.lock"))},
        "llama.cpp": llama_cpp,
        "ollama": asdict(known.ollama),
        "packaged base": asdict(known.packaged_base),
    }


def _with_tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


_IN_MANIFEST = ("package", "version", "sha256", "commit")

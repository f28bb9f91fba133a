"""A run's folder: its lock, its manifest, and files that appear whole or not at all."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.errors import PipelineError, UserError
from pipeline.processes import cores
from pipeline.resources import sha256_of
from pipeline.run.layout import Layout


class _File(BaseModel):
    size: int
    mtime_ns: int
    sha256: str


class _Record(BaseModel):
    """What is read of a stage's record; it holds more."""

    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, _File]
    figures: dict[str, Any]
    warnings: list[str]
    seconds: float
    peak_memory_bytes: int


class _Manifest(BaseModel):
    stages: dict[str, _Record]
    files: dict[str, _File] = {}


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run's folder: a second process that wants it is told who has it.

    The lock is the operating system's, so it ends with the process, however that ends.

    Raises:
        UserError: another process has it, it cannot be written, or what is in it is somebody's own.
        PipelineError: its manifest cannot be understood.
    """
    from filelock import FileLock, Timeout

    holder = run / ".lock.pid"  # stays: where it is, a run was
    try:
        run.mkdir(parents=True, exist_ok=True)
        if any(not path.name.startswith(".") for path in run.iterdir()) and not holder.exists():
            if not Layout(run).manifest.exists():
                raise UserError(
                    f"run.folder: {run}: is not empty and was made by no run, which would replace what is in it: "
                    "choose another folder"
                )
            read_manifest(run)  # it may be another program's
        (run / ".lock").touch()
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error.strerror}); choose another folder with run.folder") from None
    try:
        with FileLock(run / ".lock", timeout=0):
            holder.write_text(str(os.getpid()))
            yield
    except Timeout:
        pid = holder.read_text() if holder.exists() else "unknown"
        raise UserError(
            f"{run}: another process (process id {pid}) works in this folder; wait for it, or stop it"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run, or an empty one.

    Raises:
        PipelineError: the file is there and cannot be understood.
    """
    path = Layout(run).manifest
    remedy = "choose another folder with run.folder, and every stage runs there"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _Manifest.model_validate(manifest)
    except FileNotFoundError:
        return {"stages": {}, "files": {}}
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "no object"
        raise PipelineError(f"{path}: is no manifest of this program ({place}); {remedy}") from None
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: cannot be read ({error}); {remedy}") from None
    return manifest


def write_manifest(run: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest."""
    write_whole(Layout(run).manifest, json.dumps(manifest, indent=1, ensure_ascii=False, default=str) + "\n")


def record_files(folder: Path, run: Path) -> dict[str, dict[str, Any]]:
    """Every file below a folder of the run: its path from the run's folder, size in bytes, mtime and SHA-256."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    with ThreadPoolExecutor(cores()) as pool:
        hashes = pool.map(sha256_of, files)
        return {
            str(path.relative_to(run)): {**_stat(path), "sha256": digest}
            for path, digest in zip(files, hashes, strict=True)
        }


def unchanged(run: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """The first recorded file that is no longer what it was, or None.

    Size and time of change are enough to believe that a file is the same; where the time differs the hash decides.
    """
    for name, recorded in files.items():
        path = run / name
        if not path.is_file():
            return f"{name} is missing"
        now = _stat(path)
        if now["size"] != recorded["size"]:
            return f"{name} has changed"
        if now["mtime_ns"] != recorded["mtime_ns"] and sha256_of(path) != recorded["sha256"]:
            return f"{name} has changed"
    return None


def without_removed(run: Path, files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Recorded files without those that a later stage has removed (`Stage.removes`)."""
    return {name: file for name, file in files.items() if not file.get("removed") or (run / name).exists()}


def hash_outside(path: Path, known: dict[str, dict[str, Any]]) -> str:
    """SHA-256 of a file outside the run; `known` remembers it by path, size and time of change.

    Raises:
        UserError: the file is not there.
    """
    try:
        now = _stat(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    recorded = known.get(str(path))
    if recorded is None or any(recorded[key] != value for key, value in now.items()):
        recorded = known[str(path)] = {**now, "sha256": sha256_of(path)}
    return str(recorded["sha256"])


def _stat(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}

"""Fetching a pinned file with the ordinary client of its registry, and believing its hash only.

The clients ask whatever index, mirror, proxy or folder this machine has configured for them.
"""

import base64
import hashlib
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pipeline.errors import PipelineError
from pipeline.processes import disk_errors, find_program, run
from pipeline.resources import sha256_of
from pipeline.setup.indexes import pip_environment
from pipeline.setup.pins import NodePin, PackagePin

_WRONG_HASH = re.compile(r"do not match the hashes", re.I)
_NOT_FOUND = re.compile(r"no matching distribution|could not find a version", re.I)


def fetch_package(pin: PackagePin, target: Path, *, source: bool) -> Path:
    """Fetch a wheel or a source distribution with pip, once.

    Args:
        pin: the package.
        target: the file it becomes.
        source: take the source distribution instead of the wheel.

    Raises:
        PipelineError: no network, no such package, a wrong hash, no disk.
    """
    if target.is_file():
        _check(target, sha256_of(target), pin.sha256, pin)
        return target
    with _temporary_folder(target.parent) as folder:
        wanted = folder / "wanted.txt"
        wanted.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--no-input",
            "--disable-pip-version-check",
            "download",
            "--quiet",
        ]
        kind = ["--no-binary" if source else "--only-binary", pin.package]
        run(
            [*pip, "--no-deps", *kind, "--require-hashes", "--dest", folder / "got", "-r", wanted],
            f"fetching {pin.package} {pin.version}",
            env=pip_environment(),
            explain=(
                (
                    _WRONG_HASH,
                    f"what came has another hash than sha256:{pin.sha256}, the pinned one; nothing was kept",
                ),
                (
                    _NOT_FOUND,
                    "the package index that pip is configured for cannot be reached or does not have it",
                ),
            ),
        )
        (got,) = (folder / "got").iterdir()
        _check(got, sha256_of(got), pin.sha256, pin)
        with disk_errors(target.parent):
            got.replace(target)
    return target


def fetch_node(pin: NodePin, target: Path) -> None:
    """Fetch an npm package and unpack it to the folder `target`, once.

    Raises:
        PipelineError: no npm, no network, a wrong hash, no disk.
    """
    if target.is_dir():
        return
    npm = find_program("npm")
    if npm is None:
        raise PipelineError("npm is not installed: the tokenizers for the tests cannot be fetched; install Node.js")
    with _temporary_folder(target.parent) as folder:
        name = f"{pin.package}@{pin.version}"
        pack: list[str | Path] = [npm, "pack", "--silent", "--fetch-retries=1", "--pack-destination", folder, name]
        run(pack, f"fetching {name}")
        (archive,) = folder.glob("*.tgz")
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        _check(archive, f"sha512-{digest}", pin.integrity, pin)
        unpack(archive, folder / "tree", lambda path: path.removeprefix("package/"))
        with disk_errors(target.parent):
            (folder / "tree").rename(target)


def unpack(archive: Path, folder: Path, rename: Callable[[str], str | None]) -> None:
    """Unpack the plain files of a tar archive.

    By hand, since tarfile's own filters are in no Python before 3.11.4.

    Args:
        archive: the file.
        folder: does not exist yet.
        rename: the path inside `folder` for a path in the archive; None leaves the file out.

    Raises:
        PipelineError: the archive is damaged, or names a place outside the folder.
    """
    with disk_errors(folder.parent):
        folder.mkdir(parents=True)
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    path = rename(member.name) if member.isfile() else None
                    if path is None:
                        continue
                    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                        raise PipelineError(f"{archive}: refused, it holds a file outside of itself: {member.name}")
                    target = folder / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = tar.extractfile(member)
                    assert content is not None
                    with target.open("wb") as file:
                        shutil.copyfileobj(content, file)
                    target.chmod(0o755 if member.mode & 0o100 else 0o644)
                    # ninja compares these times: an unpacking that is repeated must not look newer.
                    os.utime(target, (member.mtime, member.mtime))
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise PipelineError(f"{archive}: damaged ({error}); delete it and run `pipeline setup` again") from error


def _check(file: Path, found: str, wanted: str, pin: PackagePin | NodePin) -> None:
    if found != wanted:
        raise PipelineError(
            f"{file}: wrong hash for {pin.package} {pin.version}: {found}, pinned is {wanted}. "
            "It is not used; delete the file and run `pipeline setup` again to fetch it anew"
        )


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder on the disk where its contents will stay, so that they can be renamed into place."""
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".fetching-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

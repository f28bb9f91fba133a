"""Fixtures that several files of tests share."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process runs all the tests that ask the one Ollama; of the others, one process runs a whole file."""
    for item in items:
        module = vars(item.getparent(pytest.Module).obj)  # type: ignore[union-attr]
        item.add_marker(pytest.mark.xdist_group("ollama" if "servers" in module else item.path.stem))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here: a full disk was not tested")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)

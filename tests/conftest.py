"""What the files of tests share: fixtures, and how the tests are shared out to processes."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

# Processes that each keep every core busy spend most of their time waiting for each other's threads.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The matrices that take too long for every day."""
    parser.addoption("--all-templates", action="store_true", help="Try every chat template that llama.cpp ships.")


# What takes long to make, by how a file imports it: the one Ollama and the runs of shared_base.py; the good run.
SHARED = {
    "the runs of shared_base.py": r"^ *from support( import .*\bservers\b|\.shared_base import)",
    "the good run": r"^ *from support\.good_run import .*\b(good|copy)_run\b",
}


@cache
def shared_by(file: Path) -> str:
    """What a file's tests share with those of other files; "" for nothing that takes long."""
    text = file.read_text("utf-8")
    return next((name for name, wanted in SHARED.items() if re.search(wanted, text, re.MULTILINE)), "")


class OnceMade(LoadFileScheduling):
    """Tests of one file run in one process, and all tests that share what takes longest to make in the same."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return shared_by(self.config.rootpath / file) or file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that at the end no process works alone: those tests, then the whole ways."""
    shared, long = [*SHARED], ("test_end_to_end.py", "test_whole_way.py")

    def place(item: pytest.Item) -> tuple[int, bool]:
        name = shared_by(item.path)
        return shared.index(name) if name else len(shared), item.path.name not in long

    items.sort(key=place)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OnceMade:
    """What shares out the tests; xdist's own marks for groups have no effect with this pytest."""
    return OnceMade(config, log)


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

"""A cache, a folder of wheels, an environment and a PATH of a test's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.setup.libraries import Environment


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
def environment(tmp_path: Path) -> Environment:
    subprocess.run(
        [sys.executable, "-m", "uv", "venv", "-q", "--python", sys.executable, tmp_path / "venv"], check=True
    )
    return Environment(tmp_path / "venv")


@pytest.fixture
def index() -> None:
    """Where packages come from has to answer: these tests install the whole lock, mostly from uv's cache."""
    asked = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", os.devnull, "six==0"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False).stderr
    if "from versions: none" in answer or "Could not find" not in answer:
        pytest.skip("no package index answers here: set-up into other environments was not tested")

"""A cache, a folder of wheels, an environment and a PATH of a test's own."""

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

"""Which version an Ollama has, and whether it serves what is promised here."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from packaging.version import InvalidVersion, Version

# The first Ollama that renders a GGUF's own Jinja template through llama.cpp, which `native` stands on.
MINIMUM_OLLAMA = "0.32.0"


def new_enough(version: str) -> bool:
    """Whether an Ollama of this version serves what is promised here; a release candidate counts as its release."""
    try:
        return Version(version.partition("-")[0]).release >= Version(MINIMUM_OLLAMA).release
    except InvalidVersion:
        return False


def program_version(program: Path) -> str:
    """The version that an ollama executable says it has, "0" if it says none."""
    nowhere = {**os.environ, "OLLAMA_HOST": "127.0.0.1:1"}  # never ask a running server
    try:
        answer = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=30, env=nowhere, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "0"
    found = re.search(r"version is v?(\S+)", answer.stdout + answer.stderr)
    return found.group(1) if found else "0"


def system_ollama() -> Path | None:
    """The machine's own Ollama, if it is new enough. Nothing about it is changed."""
    found = shutil.which("ollama")
    return Path(found) if found and new_enough(program_version(Path(found))) else None

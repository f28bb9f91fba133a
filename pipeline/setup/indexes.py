"""uv told to ask where pip is configured to ask: who has a mirror or a folder of wheels has told pip of it.

uv does not read pip's configuration. What is set for uv itself wins.
"""

import os
import shlex
import subprocess
import sys

_UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
}


def uv_environment() -> dict[str, str]:
    """Variables for uv that say what pip's configuration files and variables say."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, str] = {}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section not in ("global", "install", ":env:"):
            continue
        words = " ".join(shlex.split(value)).split()
        if name == "no-index" and words in (["1"], ["true"], ["yes"]):
            found["UV_NO_INDEX"] = "1"
        elif variable := _UV_NAMES.get(name):
            found[variable] = ("," if variable == "UV_FIND_LINKS" else " ").join(words)
    return {name: value for name, value in found.items() if name not in os.environ}

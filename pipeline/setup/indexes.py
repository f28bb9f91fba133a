"""What of this machine's configuration uv and pip are given: where packages come from and how to get there, no more.

The user's indexes, folders of wheels, proxies and certificates stay in force, whether they were told to pip or to uv.
Everything else that could change what is installed (constraints, overrides, dates, sources; of the checkout or of the
user) is kept from it: the lock alone says what is installed.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

# Variables of uv that say where from and how, by their names or the beginnings of those.
_KEPT = re.compile(
    r"UV_(DEFAULT_INDEX|INDEX|INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS|NO_INDEX|INDEX_\w+_(USERNAME|PASSWORD)"
    r"|KEYRING_PROVIDER|INSECURE_HOST|SYSTEM_CERTS|NATIVE_TLS|CREDENTIALS_DIR|OFFLINE|CACHE_DIR|NO_CACHE|LINK_MODE"
    r"|HTTP_\w+|REQUEST_TIMEOUT|CONCURRENT_\w+)"
)
# pip's options that say where from and how, and uv's variables for the same thing, where it has one.
_OF_PIP = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "keyring-provider": None,  # pip's and uv's ways with it differ
    "timeout": None,
    "retries": None,
    "cache-dir": None,
}
# Where pip finds options, each winning over those before it.
_SECTIONS = ("global", "download", "install", ":env:")
# The same of uv's own configuration files.
_OF_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "allow-insecure-host": "UV_INSECURE_HOST",
    "keyring-provider": "UV_KEYRING_PROVIDER",
    "native-tls": "UV_SYSTEM_CERTS",
    "system-certs": "UV_SYSTEM_CERTS",
    "offline": "UV_OFFLINE",
    "cache-dir": "UV_CACHE_DIR",
    "http-proxy": "HTTP_PROXY",
    "https-proxy": "HTTPS_PROXY",
    "no-proxy": "NO_PROXY",
}


def uv_environment() -> dict[str, str | None]:
    """Variables for uv, to be added to this process's own; None takes one away.

    What was told to uv itself wins over what was told to pip, and a variable over a file.
    """
    found = {**_from_pip(), **_from_uv_files()}
    variables: dict[str, str | None] = {name: value for name, value in found.items() if not os.environ.get(name)}
    # An index of the user's own replaces the usual one, under whichever of its two names it was given.
    if os.environ.get("UV_INDEX_URL"):
        variables.pop("UV_DEFAULT_INDEX", None)
    variables |= {name: None for name in os.environ if name.startswith("UV_") and not _KEPT.fullmatch(name)}
    return {**variables, "UV_NO_CONFIG": "1"}


def uv_options(variables: dict[str, str | None]) -> list[str]:
    """What uv takes as an option alone: of its variables, --no-index has none.

    Args:
        variables: of `uv_environment`.
    """
    return ["--no-index"] if variables.get("UV_NO_INDEX") or os.environ.get("UV_NO_INDEX") else []


def pip_environment() -> dict[str, str | None]:
    """Variables for pip, to be added to this process's own; None takes one away."""
    variables: dict[str, str | None] = dict.fromkeys(name for name in os.environ if name.startswith("PIP_"))
    for name, words in _pip_options().items():
        variables[f"PIP_{name.upper().replace('-', '_')}"] = " ".join(words)
    return {**variables, "PIP_CONFIG_FILE": os.devnull}


def _from_pip() -> dict[str, str]:
    found: dict[str, str] = {}
    for name, words in _pip_options().items():
        variable = _OF_PIP[name]
        if name == "no-index":
            found |= {"UV_NO_INDEX": "1"} if words and words[0].lower() in ("1", "true", "yes", "on") else {}
        elif variable is not None:
            found[variable] = _joined(variable, words)
    return found


def _pip_options() -> dict[str, list[str]]:
    """Those of pip's options that are kept, each as words, from its files and its variables."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, dict[str, list[str]]] = {section: {} for section in _SECTIONS}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in found and name in _OF_PIP:
            with suppress(ValueError, SyntaxError):
                found[section][name] = str(ast.literal_eval(value)).split()  # pip writes it as Python does
    return {name: words for section in _SECTIONS for name, words in found[section].items()}


def _from_uv_files() -> dict[str, str]:
    """The user's configuration file and, for what that leaves open, the machine's."""
    if os.environ.get("UV_NO_CONFIG"):
        return {}
    if given := os.environ.get("UV_CONFIG_FILE"):
        places = [Path(given)]
    else:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        shared = (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")
        places = [home / "uv/uv.toml", *(Path(folder) / "uv/uv.toml" for folder in shared), Path("/etc/uv/uv.toml")]
    found: dict[str, str] = {}
    for path in reversed(places):
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found |= _settings(table) | _settings(table.get("pip", {}))
    return found


def _settings(table: Any) -> dict[str, str]:
    if not isinstance(table, dict):
        return {}
    found: dict[str, str] = {}
    for key, variable in _OF_UV.items():
        value = table.get(key)
        if isinstance(value, bool):
            found |= {variable: "1"} if value else {}
        elif isinstance(value, str | list):
            found[variable] = _joined(variable, [value] if isinstance(value, str) else [str(item) for item in value])
    indexes = [index for index in table.get("index", ()) if isinstance(index, dict) and "url" in index]
    # An explicit index serves only packages that a project names for it: the lock names none.
    named = [
        (f"{index['name']}={index['url']}" if "name" in index else str(index["url"]), bool(index.get("default")))
        for index in indexes
        if not index.get("explicit")
    ]
    if more := [index for index, default in named if not default]:
        found["UV_INDEX"] = " ".join([*more, *found.get("UV_INDEX", "").split()])
    if default := [index for index, default in named if default]:
        found["UV_DEFAULT_INDEX"] = default[0]
    return found


def _joined(variable: str, words: list[str]) -> str:
    return ("," if variable == "UV_FIND_LINKS" else " ").join(words)

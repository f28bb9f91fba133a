"""The address of an Ollama server, read as Ollama itself reads OLLAMA_HOST, and the password of a proxy in front of it.

A user name and a password are taken from OLLAMA_HOST alone: what stands in a configuration or on a command line is
written into the run's folder. They are used where a server of that very address is asked, and kept nowhere:

    OLLAMA_HOST=http://me:secret@gpu.example/ollama pipeline deploy
"""

import os
import re
from ipaddress import IPv6Address, ip_address
from urllib.parse import SplitResult, unquote, urlsplit

from pipeline.errors import UserError

DEFAULT_HOST = "http://127.0.0.1:11434"
_VARIABLE = "OLLAMA_HOST"
_CALLED = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - addresses to listen on, not to call
_DOMAIN = re.compile(r"[\w-]{1,63}(\.[\w-]{1,63})*\.?")
_PATH = re.compile(r"[\w./~%!$&'()*+,;=:-]*", re.ASCII)


def normal_host(host: str, source: str = "ollama.host") -> str:
    """An address as a URL with a port, and with the path below which a proxy has Ollama.

    Args:
        host: the address; "127.0.0.1:11434", "http://host/ollama" and a bare host name are all fine.
        source: where it was given, for the message.

    Raises:
        UserError: it is no address, or holds a password where that would be written down.
    """
    parts = _split(host, source)
    if "@" in parts.netloc and source != _VARIABLE:
        raise UserError(
            f"{source} = {without_password(host)!r}: holds a user name or a password, which would be written into the "
            f"run's folder: leave it out here, and set the variable {_VARIABLE} to the same address with it"
        )
    name = parts.hostname or ""
    name = f"[{name}]" if ":" in name else name
    name = _CALLED.get(name, name)
    default = {"http": 80, "https": 443}[parts.scheme] if "://" in host else 11434
    return f"{parts.scheme}://{name}:{parts.port or default}{parts.path.rstrip('/')}"


def is_here(url: str) -> bool:
    """Whether a URL's host is this machine."""
    name = (urlsplit(url).hostname or "").lower()
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def usual_host() -> str:
    """Where an Ollama is looked for if none is configured: OLLAMA_HOST, else the usual address.

    Raises:
        UserError: OLLAMA_HOST is no address.
    """
    return normal_host(_given() or DEFAULT_HOST, _VARIABLE)


def given_host() -> str:
    """OLLAMA_HOST as it may be shown, "" where it is not set."""
    return without_password(_given())


def credentials(address: str) -> tuple[str, str] | None:
    """The user name and the password for an address of `normal_host`: those in OLLAMA_HOST, if that is this address."""
    if not (given := _given()) or "@" not in given or normal_host(given, _VARIABLE) != address:
        return None
    parts = _split(given, _VARIABLE)
    return unquote(parts.username or ""), unquote(parts.password or "")


def without_password(text: str) -> str:
    """An address, or the option of a command that gives one, with *** for all that stands before its last @."""
    return re.sub(r"^((?:--set [^=]*=)?[\s\"']*(?:\w+://)?).*@", r"\1***@", text, flags=re.DOTALL)


def _given() -> str:
    return os.environ.get(_VARIABLE, "").strip()


def _split(host: str, source: str) -> SplitResult:
    text = host.strip(" \t\r\n\"'")
    if re.match(r":\w", text):  # ":11435" is a port of this machine
        text = f"127.0.0.1{text}"
    scheme, named_scheme, rest = text.rpartition("://")
    rest = re.sub(r"^((?:[^/]*@)?)([0-9a-fA-F:.]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*)(?=/|$)", r"\1[\2]", rest)  # "::1"
    try:
        parts = urlsplit(f"{scheme if named_scheme else 'http'}://{rest}")
        name = parts.hostname or ""
        named = bool(_DOMAIN.fullmatch(name) or (":" in name and IPv6Address(name)))
        usable = parts.scheme in ("http", "https") and parts.port != 0
        usable = usable and bool(_PATH.fullmatch(parts.path)) and not (parts.query or parts.fragment)
    except ValueError:
        named = usable = False
    if not (named and usable) or re.search(r"\s", text):  # urlsplit leaves some of it out
        raise UserError(f"{source} = {without_password(host)!r}: not an address; write e.g. {DEFAULT_HOST}")
    return parts

"""How an Ollama is reached, as its own client reaches it: the certificates that are trusted, the proxy on the way, and
what is said where it cannot be reached.

SSL_CERT_FILE and SSL_CERT_DIR name certificates of one's own. HTTP_PROXY, HTTPS_PROXY and NO_PROXY (or in lower case)
name the proxy for hosts that are not this machine:

    HTTPS_PROXY=http://proxy.example:3128 NO_PROXY=10.0.0.0/8,.example pipeline deploy --host https://gpu.other
"""

import os
import socket
import ssl
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from pipeline.errors import UserError
from pipeline.ollama.address import is_here, without_password

_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def options(address: str) -> dict[str, Any]:
    """What `httpx.Client` has to be told for an address of `normal_host`.

    Raises:
        UserError: a variable names no proxy, or no file with certificates.
    """
    proxy = proxy_for(address)
    encrypted = address.startswith("https:") or (proxy and proxy[1].startswith("https:"))
    # Reading certificates takes 30 ms, and nothing asks for them where nothing is encrypted.
    return {"trust_env": False, "proxy": proxy and proxy[1], "verify": _trusted() if encrypted else False}


def proxy_for(address: str) -> tuple[str, str] | None:
    """The variable that names a proxy for an address, and the proxy; None where the way is direct.

    The rules are those of Go's httpproxy package, by which Ollama's own client goes.

    Raises:
        UserError: the variable names no proxy.
    """
    parts = urlsplit(address)
    name = f"{parts.scheme}_proxy"
    variable = name.upper() if os.environ.get(name.upper()) else name
    given = os.environ.get(variable, "").strip()
    if not given or _direct(parts):
        return None
    proxy = given if "://" in given else f"http://{given}"
    try:
        found = urlsplit(proxy)
        usable = found.scheme in _PROXY_SCHEMES and bool(found.hostname) and found.port != 0
    except ValueError:
        usable = False
    if not usable:
        shown = without_password(given)
        raise UserError(f"{variable}={shown}: not a proxy's address; write e.g. http://proxy.example:3128, or unset it")
    return variable, proxy


def _direct(parts: SplitResult) -> bool:
    """Whether a host is this machine, or NO_PROXY has it."""
    host = (parts.hostname or "").lower()
    try:
        ip = ip_address(host)
    except ValueError:
        ip = None
    if is_here(parts.geturl()):
        return True
    for entry in (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").lower().split(","):
        if not (entry := entry.strip()):
            continue
        if entry == "*":
            return True
        try:
            network = ip_network(entry.strip("[]"), strict=False)
        except ValueError:
            name, colon, port = entry.rpartition(":")
            if not (colon and port.isdigit()):
                name, port = entry, ""
            name = name.strip("[]").removeprefix("*")
            if (host == name or host.endswith(f".{name.removeprefix('.')}")) and port in ("", str(parts.port)):
                return True
        else:
            if ip is not None and ip in network:
                return True
    return False


def _trusted() -> ssl.SSLContext:
    """The system's certificates, or those of SSL_CERT_FILE and SSL_CERT_DIR."""
    for variable, there in (("SSL_CERT_FILE", Path.is_file), ("SSL_CERT_DIR", Path.is_dir)):
        if (given := os.environ.get(variable)) and not there(Path(given)):
            raise UserError(f"{variable}={given}: there is nothing of this kind; correct the variable, or unset it")
    try:
        context = ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or None)
    except ssl.SSLError:
        raise UserError(
            f"SSL_CERT_FILE={os.environ.get('SSL_CERT_FILE')}: holds no certificates in PEM form; give the file that "
            "begins with -----BEGIN CERTIFICATE-----"
        ) from None
    if os.environ.get("SSL_CERT_DIR"):
        context.load_verify_locations(capath=os.environ["SSL_CERT_DIR"])
    elif not os.environ.get("SSL_CERT_FILE") and not context.cert_store_stats()["x509_ca"]:
        import certifi  # a Python that does not know where this system keeps its own

        context.load_verify_locations(certifi.where())
    return context


def unreachable(address: str, error: Exception) -> str:
    """Why nothing was reached at an address, and what to do.

    Args:
        address: of `normal_host`.
        error: what httpx raised.
    """
    import httpx

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for found in causes:
        if isinstance(found, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {address} does not hold ({found.verify_message.rstrip('.')}): if it is your "
                "company's, set SSL_CERT_FILE to the PEM file with the certificates that it is signed with; if the "
                "name is wrong, give the one that the certificate is for"
            )
        if isinstance(found, ssl.SSLError):
            return f"{address} speaks no https that is understood here ({found.reason}): try http://"
        if isinstance(found, socket.gaierror) and not proxy_for(address):
            return f"there is no host {urlsplit(address).hostname} that is known here ({found.strerror}): see its name"
    if proxy := proxy_for(address):
        variable, name = proxy
        if isinstance(error, httpx.ProxyError) or not isinstance(error, ValueError):
            words = str(error) or type(error).__name__
            return (
                f"no Ollama answers at {address} through the proxy {without_password(name)} of {variable} ({words}); "
                "if it is to be reached without one, name its host in NO_PROXY"
            )
    if isinstance(error, httpx.ReadError | httpx.RemoteProtocolError) and address.startswith("http:"):
        return (
            f"no Ollama answers at {address}: what listens there hangs up ({type(error).__name__}); try https://, or "
            "see whether Ollama runs behind it"
        )
    return f"no Ollama answers at {address} ({type(error).__name__}); start it with `ollama serve`"

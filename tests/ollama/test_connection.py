"""How an Ollama is reached: a company's certificates, the proxies of the environment, and what is said on the way."""

from pathlib import Path

import pytest
from support import servers
from support.proxy import make_certificate, proxy

from pipeline.errors import UserError
from pipeline.ollama.client import Client
from pipeline.ollama.connection import proxy_for

ELSEWHERE = "http://ollama.example:11434"
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *map(str.lower, VARIABLES), "OLLAMA_HOST"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate") / "own.pem", "DNS:ollama.example,IP:127.0.0.1")


def test_a_certificate_of_ones_own(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(servers.ollama().host, certificate=certificate) as host:
        with pytest.raises(UserError, match=r"certificate of .* does not hold \(self.signed .*SSL_CERT_FILE"):
            Client(host)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with Client(host) as client:
            assert client.names() == servers.client().names()
        with pytest.raises(UserError, match="does not hold .*the one that the certificate is for"):
            Client(host.replace("127.0.0.1", "localhost"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        with pytest.raises(UserError, match=r"SSL_CERT_FILE=.*none\.pem: there is nothing"):
            Client(host)
        monkeypatch.setenv("SSL_CERT_FILE", str(Path(__file__)))
        with pytest.raises(UserError, match="SSL_CERT_FILE=.*holds no certificates"):
            Client(host)


def test_https_where_there_is_none() -> None:
    with pytest.raises(UserError, match="speaks no https .*try http://"):
        Client(servers.ollama().host.replace("http:", "https:"))


def test_http_where_it_is_https_and_a_host_that_there_is_not(certificate: Path) -> None:
    with (
        proxy("http://127.0.0.1:9", certificate=certificate) as host,
        pytest.raises(UserError, match="hangs up .*try https://"),
    ):
        Client(host.replace("https:", "http:"))
    with pytest.raises(UserError, match="there is no host nowhere.invalid that is known here"):
        Client("http://nowhere.invalid:11434")


def test_through_the_proxy_of_the_environment(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = servers.client().names()
    with proxy(servers.ollama().host, login="me:hush") as gate:
        monkeypatch.setenv("HTTP_PROXY", gate.replace("//", "//me:hush@"))
        with Client(ELSEWHERE) as client:
            assert client.names() == names
        with Client(servers.ollama().host) as client:  # this machine is asked directly
            assert client.names() == names
        monkeypatch.setenv("HTTP_PROXY", gate.replace("//", "//me:hushed@"))
        with pytest.raises(UserError, match=r"HTTP status 407 .*user name and a password") as error:
            Client(ELSEWHERE)
        assert "hush" not in str(error.value)
    with proxy(servers.ollama().host, certificate=certificate) as inner, proxy(inner, login="me:hush") as gate:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        monkeypatch.setenv("https_proxy", gate.replace("//", "//me:hush@"))
        with Client("https://ollama.example/") as client:
            assert client.names() == names
        monkeypatch.setenv("https_proxy", gate.replace("//", "//me:hushed@"))
        with pytest.raises(UserError, match=r"through the proxy http://\*\*\*@127.* of https_proxy .*407") as error:
            Client("https://ollama.example/")
        assert "hush" not in str(error.value)


def test_a_proxy_that_is_down_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "me:hush@127.0.0.1:1")
    with pytest.raises(UserError, match=r"the proxy http://\*\*\*@127.0.0.1:1 of HTTP_PROXY .*NO_PROXY") as error:
        Client(ELSEWHERE)
    assert "hush" not in str(error.value)
    monkeypatch.setenv("HTTP_PROXY", "ftp://me:hush@there")
    with pytest.raises(UserError, match=r"HTTP_PROXY=ftp://\*\*\*@there: not a proxy's address"):
        Client(ELSEWHERE)


@pytest.mark.parametrize(
    ("without", "address", "direct"),
    [
        ("", "http://localhost:11434", True),
        ("", "http://127.8.8.8:11434", True),
        ("", "http://[::1]:11434", True),
        ("", "http://10.1.2.3:11434", False),
        ("*", "http://gpu.example:11434", True),
        ("10.0.0.0/8", "http://10.1.2.3:11434", True),
        ("10.0.0.0/8", "http://11.1.2.3:11434", False),
        ("11.1.2.3", "http://11.1.2.3:11434", True),
        ("fd00::/8", "http://[fd00::1]:11434", True),
        ("example", "http://gpu.example:11434", True),
        (" .Example , other", "http://gpu.example:11434", True),
        ("*.example", "http://gpu.example:11434", True),
        ("example", "http://gpuexample:11434", False),
        ("gpu.example:11434", "http://gpu.example:11434", True),
        ("gpu.example:80", "http://gpu.example:11434", False),
    ],
)
def test_which_hosts_are_asked_directly(
    without: str, address: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", without)
    assert proxy_for(address) == (None if direct else ("http_proxy", "http://proxy.example:3128"))

"""A proxy in front of a server: below a path, for a user with a password, for requests up to a size, over https; and
one for those who set HTTP_PROXY, which alone knows where the hosts are.
"""

import base64
import http.client
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

PAGE = "<html><head><title>{0}</title></head><body><center><h1>{0}</h1></center><hr>nginx</body></html>"
_HOP = ("host", "connection", "transfer-encoding", "content-length", "authorization", "proxy-authorization")


@contextmanager
def proxy(
    upstream: str, prefix: str = "", login: str = "", limit: int = 0, certificate: Path | None = None
) -> Iterator[str]:
    """Run it.

    Args:
        upstream: the server's address. A client that takes this for its own proxy gets there whatever it asks for.
        prefix: the path below which the server is, e.g. "/ollama".
        login: "user:password" that is wanted.
        limit: the most bytes of a request; 0 for any number.
        certificate: of `make_certificate`; then it speaks https.

    Yields:
        The proxy's own address, without path and password.
    """
    server = urlsplit(upstream)
    wanted = f"Basic {base64.b64encode(login.encode()).decode()}"

    class Handler(BaseHTTPRequestHandler):
        def _refuse(self, status: str) -> None:
            body = PAGE.format(status).encode()
            self.send_response(int(status[:3]))
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _refused(self, path: str) -> str | None:
            if login and not self._asked_as_proxy() and self.headers.get("Authorization") != wanted:
                return "401 Authorization Required"
            if login and self._asked_as_proxy() and self.headers.get("Proxy-Authorization") != wanted:
                return "407 Proxy Authentication Required"
            if not path.startswith(f"{prefix}/"):
                return "404 Not Found"
            if limit and int(self.headers.get("Content-Length") or 0) > limit:
                return "413 Request Entity Too Large"
            return None

        def _asked_as_proxy(self) -> bool:
            return self.command == "CONNECT" or "://" in self.path

        def _any(self) -> None:
            path = urlsplit(self.path).path
            if status := self._refused(path):
                return self._refuse(status)
            connection = http.client.HTTPConnection(server.hostname or "", server.port, timeout=60)
            headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP}
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection.request(self.command, path[len(prefix) :], content, headers)
            answer = connection.getresponse()
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in _HOP:
                    self.send_header(key, value)
            self.end_headers()
            while piece := answer.read1(65536):
                self.wfile.write(piece)

        do_GET = do_POST = do_HEAD = do_DELETE = _any

        def do_CONNECT(self) -> None:
            if status := self._refused("/"):
                return self._refuse(status)
            with socket.create_connection((server.hostname or "", server.port or 0)) as there:
                self.send_response(200)
                self.end_headers()
                back = threading.Thread(target=_pass_on, args=(there, self.connection), daemon=True)
                back.start()
                _pass_on(self.connection, there)
                back.join()
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            listening.socket = context.wrap_socket(listening.socket, server_side=True)
        listening.handle_error = lambda *_: None  # type: ignore[method-assign]  # who does not trust it hangs up
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http{'s' if certificate else ''}://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one of the two has hung up


def make_certificate(path: Path, names: str) -> Path:
    """A certificate that signs itself, with its key, in one PEM file; names as openssl has them: "DNS:a,IP:::1"."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    files = ["-keyout", path, "-out", path.with_suffix(".crt")]
    subprocess.run([*command, "-addext", f"subjectAltName={names}", *files], check=True, capture_output=True)
    with path.open("a") as file:
        file.write(path.with_suffix(".crt").read_text())
    return path

"""A reverse proxy in front of a server: below a path, for a user with a password, for requests up to a size."""

import base64
import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PAGE = "<html><head><title>{0}</title></head><body><center><h1>{0}</h1></center><hr>nginx</body></html>"
_HOP = ("host", "connection", "transfer-encoding", "content-length", "authorization")


@contextmanager
def proxy(upstream: str, prefix: str = "", login: str = "", limit: int = 0) -> Iterator[str]:
    """Run it.

    Args:
        upstream: the server's address.
        prefix: the path below which the server is, e.g. "/ollama".
        login: "user:password" that is wanted.
        limit: the most bytes of a request; 0 for any number.

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

        def _any(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if login and self.headers.get("Authorization") != wanted:
                return self._refuse("401 Authorization Required")
            if not self.path.startswith(f"{prefix}/"):
                return self._refuse("404 Not Found")
            if limit and size > limit:
                return self._refuse("413 Request Entity Too Large")
            connection = http.client.HTTPConnection(server.hostname or "", server.port, timeout=60)
            headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP}
            connection.request(self.command, self.path[len(prefix) :], self.rfile.read(size), headers)
            answer = connection.getresponse()
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in _HOP:
                    self.send_header(key, value)
            self.end_headers()
            while piece := answer.read1(65536):
                self.wfile.write(piece)

        do_GET = do_POST = do_HEAD = do_DELETE = _any

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()

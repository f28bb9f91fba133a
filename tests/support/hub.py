"""A model hub on a loopback port: what huggingface_hub asks of one, answered from a folder."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


class Hub:
    """Serves one model, or one data set, and knows of a gated one.

    Args:
        name: its id.
        folder: its files.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *arguments: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                status, content, headers = hub.answer(self.path, self.headers.get("Range"))
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, wanted: str | None) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers for a path; `wanted` is the range of bytes that is asked for."""
        path = path.partition("?")[0].removeprefix("/api/models").removeprefix("/api")
        path = path.removeprefix("/datasets").strip("/")
        if path.startswith("someone/gated"):
            return 403, b"", {"X-Error-Code": "GatedRepo"}
        if not path.startswith(self.name):
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        action, _, rest = path.removeprefix(self.name).strip("/").partition("/")
        revision, _, file = (rest or "main").partition("/")
        if revision not in REVISIONS:
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        names = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        files = dict(sorted(names.items()))
        described: dict[str, object] = {
            "": {"id": self.name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]},
            "tree": [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": COMMIT}
                for name, file in files.items()
            ],
        }
        described["revision"] = described[""]
        if action in described:
            return 200, json.dumps(described[action]).encode(), {"Content-Type": "application/json"}
        if action != "resolve" or not (self.folder / file).is_file():
            return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        content, headers = (
            (self.folder / file).read_bytes(),
            {"ETag": f'"{file.replace("/", "-")}-1"', "X-Repo-Commit": COMMIT},
        )
        if wanted is None:
            return 200, content, headers
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = min(int(last) + 1 if last else len(content), len(content))
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
        return 206, content[int(first) : end], headers

"""OpenAI's API for several adapters on one llama-server: the model's name in a request chooses the adapter.

llama-server takes the scale of each adapter with every request, but knows them by their numbers alone. This stands in
front of it, turns a name into that field, and passes the answer on as it comes:

    {"model": "bash", "messages": [...]}   ->   {..., "lora": [{"id": 1, "scale": 1.0}]}

An adapter that a request does not list is not applied.
"""

from __future__ import annotations

import hmac
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from pipeline.errors import PipelineError, UserError
from pipeline.lines import lines
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.processes import ON_THIS_MACHINE

API_KEY = "PIPELINE_API_KEY"  # the variable with the key that requests have to show; it is written down nowhere
LARGEST_REQUEST = 64 << 20  # bytes of a request
_CHAT, _TEXT, _MODELS, _HEALTH = "/v1/chat/completions", "/v1/completions", "/v1/models", "/health"


@dataclass(frozen=True)
class ServedAdapter:
    """What a name stands for.

    Attributes:
        number: the adapter's place in llama-server's list.
        system: the system message of a conversation that has none; "" for none.
        defaults: fields of a request that are set where it leaves them out, e.g. temperature.
    """

    number: int
    system: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A client's request as llama-server is asked it."""
        asked = {**self.defaults, **body, "lora": [{"id": self.number, "scale": 1.0}]}
        messages = asked.get("messages")
        if self.system and isinstance(messages, list) and not any(_role(message) == "system" for message in messages):
            asked["messages"] = [{"role": "system", "content": self.system}, *messages]
        return asked


def _named(line: bytes, name: str) -> bytes:
    """A line of llama-server's answer: of a JSON object, or an event that holds one, the model's name is set.

    llama-server would say the path of its file.
    """
    start, brace, rest = line.partition(b"{")
    if start not in (b"", b"data: "):
        return line
    try:
        content = json.loads(brace + rest)
    except ValueError:
        return line
    if "model" not in content:
        return line
    return start + json.dumps(content | {"model": name}, ensure_ascii=False).encode("utf-8", "replace")


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


class AdapterProxy(ThreadingHTTPServer):
    """Answers `/v1/models`, `/v1/chat/completions`, `/v1/completions` and `/health`. A context manager, bound at once.

    Args:
        server: the running llama-server, with all the adapters.
        adapters: by the names that requests choose them by.
        host, port: the address to listen on; port 0 takes a free one.
        key: what requests have to show as `Authorization: Bearer KEY`; "" for nothing.

    Raises:
        UserError: the address cannot be listened on.
    """

    daemon_threads = True

    def __init__(
        self, server: LlamaServer, adapters: Mapping[str, ServedAdapter], host: str, port: int, key: str = ""
    ) -> None:
        self.server, self.adapters, self.key = server, dict(adapters), key
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UserError(f"{host}, port {port}: cannot be listened on: {error.strerror}; choose another") from None
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_address[1]}"

    def service_actions(self) -> None:
        """Called between requests: without llama-server there is nothing to serve.

        Raises:
            PipelineError: it has ended.
        """
        if (status := self.server.process.poll()) is not None:
            raise PipelineError(f"llama-server has ended with status {status}")


class _Handler(BaseHTTPRequestHandler):
    server: AdapterProxy
    timeout = 60  # seconds for a client to say what it wants

    def do_GET(self) -> None:
        if self.path == _HEALTH:
            self._say(200, {"status": "ok"})
        elif self._may():
            if self.path == _MODELS:
                rows = [{"id": name, "object": "model", "owned_by": "pipeline"} for name in self.server.adapters]
                self._say(200, {"object": "list", "data": rows})
            else:
                self._refuse(404, f"there is no {self.path}; {_MODELS}, {_CHAT} and {_TEXT} are here")

    def do_POST(self) -> None:
        if not self._may():
            return
        if self.path not in (_CHAT, _TEXT):
            self._refuse(404, f"there is no {self.path}; {_CHAT} and {_TEXT} take a POST")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST_REQUEST:
            self._refuse(413, f"the length of the request must be given, and be at most {LARGEST_REQUEST} bytes")
            return
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self._refuse(400, "the request is no JSON object")
            return
        name = body.get("model")
        adapter = self.server.adapters.get(name) if isinstance(name, str) else None
        if adapter is None:
            known = ", ".join(self.server.adapters)
            self._refuse(404, f"there is no model {name!r} here; the models are {known}", "model_not_found")
            return
        self._pass_on(adapter.request(body))

    def _pass_on(self, body: Mapping[str, Any]) -> None:
        """Ask llama-server, and give its answer line by line as it comes, under the name that was asked for."""
        timeout = httpx.Timeout(10, read=None)  # requests wait for one another
        headers = {"Accept-Encoding": "identity"}
        begun = False
        try:
            url = f"{self.server.server.url}{self.path}"
            with httpx.stream("POST", url, json=body, headers=headers, timeout=timeout, **ON_THIS_MACHINE) as answer:
                begun = True
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                self.end_headers()
                for line in lines(answer.iter_bytes()):
                    self.wfile.write(_named(line, body["model"]) + b"\n")
                    self.wfile.flush()
        except httpx.HTTPError as error:
            if not begun:
                self._refuse(502, f"llama-server does not answer: {error or type(error).__name__}")
        except OSError:  # the client has gone; what it asked for ends with the connection
            pass

    def _may(self) -> bool:
        key = self.server.key
        shown = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not key or hmac.compare_digest(shown.encode("latin-1"), key.encode()):
            return True
        self._refuse(401, "an API key is wanted, as `Authorization: Bearer KEY`", "invalid_api_key")
        return False

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        error = {"message": message, "type": "invalid_request_error", "code": code or None}
        self._say(status, {"error": error})

    def _say(self, status: int, content: Mapping[str, Any]) -> None:
        data = json.dumps(content, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def version_string(self) -> str:
        """What the header Server says: nothing of Python."""
        return "pipeline"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what is asked is nobody's concern but the client's."""

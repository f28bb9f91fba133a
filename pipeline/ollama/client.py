"""What is asked of an Ollama server, over its HTTP interface. Every failure ends in one message that says what to do.

The `ollama` package is not used: it reads a stream by httpx's lines, which end at a U+0085 in an answer too, and has
neither REQUIRES, nor the debug rendering of a prompt, nor an upload with progress.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import figures
from pipeline.errors import PipelineError, UserError
from pipeline.lines import lines
from pipeline.ollama import connection
from pipeline.ollama.address import DEFAULT_HOST, credentials, normal_host
from pipeline.ollama.model_names import canonical
from pipeline.processes import NO_SPACE, require_space
from pipeline.prompt.conformance import RenderRefused
from pipeline.resources import sha256_of
from pipeline.setup.ollama_version import MINIMUM_OLLAMA, new_enough

if TYPE_CHECKING:
    import httpx


class Client:
    """An Ollama server.

    Args:
        host: its address; "127.0.0.1:11434", "http://host/ollama" and a bare host name are all fine.

    Raises:
        UserError: the address is none, nothing answers there, a proxy refuses, or it is too old.
    """

    def __init__(self, host: str | None = None) -> None:
        import httpx

        self.host = normal_host(host or DEFAULT_HOST)
        timeout = httpx.Timeout(600, connect=5)
        try:
            self._http = httpx.Client(
                base_url=self.host, auth=credentials(self.host), timeout=timeout, **connection.options(self.host)
            )
        except ImportError:  # httpx needs one more library for it, which is not locked
            raise UserError(f"{self.host}: a SOCKS proxy cannot be used here; name an HTTP proxy") from None
        try:
            answer = self._http.get("/api/version", timeout=5)
            if not answer.is_success:
                raise UserError(f"no Ollama can be asked at {self.host}: {_words(answer)}")
            self.version = str(answer.json()["version"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise UserError(connection.unreachable(self.host, error)) from None
        if not new_enough(self.version):
            raise UserError(
                f"Ollama {self.version} at {self.host} is too old: {MINIMUM_OLLAMA} or newer is needed; update it"
            )

    def names(self) -> dict[str, str]:
        """The models on the server: name with tag -> digest of the manifest."""
        models = self._ask("GET", "/api/tags").json().get("models") or []
        return {model["model"]: model.get("digest") or "" for model in models}

    def digest(self, name: str) -> str | None:
        """The digest of the model that the server means by a name, or None if it has none."""
        return {canonical(there): digest for there, digest in self.names().items()}.get(canonical(name))

    def create(
        self,
        name: str,
        body: Mapping[str, Any],
        progress: Callable[[str, float], None] = lambda status, share: None,
    ) -> None:
        """Make a model, from files that have been uploaded or from another model.

        Args:
            name: the new model's name.
            body: the fields of `POST /api/create`: `from` or `files`, and any of adapters, template, system,
                parameters, messages, license, requires.
            progress: called with the server's words and a share from 0 to 1.

        Raises:
            PipelineError: the server refused; with its words.
        """
        for step in self._stream("/api/create", {**body, "model": name}):
            progress(step.get("status") or "", (step.get("completed") or 0) / (step.get("total") or 1))

    def upload(
        self, path: Path, progress: Callable[[float], None] = lambda done: None, store: Path | None = None
    ) -> str:
        """Give a file to the server, unless it has it already.

        Args:
            path: the file.
            progress: called with the bytes sent so far.
            store: the folder of the server's models, where that is known: it must have room.

        Returns:
            Its digest, "sha256:...".

        Raises:
            PipelineError: the server or a proxy in front of it did not take it.
        """
        import httpx

        digest, size = f"sha256:{sha256_of(path)}", path.stat().st_size
        there = self._send("HEAD", f"/api/blobs/{digest}").is_success
        if store is not None:  # `create` copies the file once more, to check it, also where it is there already
            require_space(store, size if there else 2 * size, "Ollama's copy of the model, twice while it checks it")
        if there:
            progress(size)
            return digest

        def pieces() -> Iterator[bytes]:
            sent = 0
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    yield piece
                    sent += len(piece)
                    progress(sent)

        try:
            # With its length said, a proxy that has a limit refuses it before it is sent.
            length = {"Content-Length": str(size)}
            answer = self._http.post(f"/api/blobs/{digest}", content=pieces(), headers=length)
        except httpx.HTTPError as error:
            raise PipelineError(
                f"{path.name} could not be given to Ollama at {self.host}: {error}; see whether its disk is full "
                f"({figures.size(size)} are needed, and as much again while it checks them)"
            ) from None
        self._check(answer, f"{path.name} was not taken by Ollama at {self.host}")
        return digest

    def render(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        think: bool | None = None,
    ) -> str:
        """The prompt that the server would send the model for these messages. Nothing is generated.

        Raises:
            RenderRefused: the template refused them.
            PipelineError: nothing was rendered, for another reason.
        """
        body = _chat_body(name, messages, tools, think) | {"_debug_render_only": True, "truncate": False}
        answer = self._send("POST", "/api/chat", json=body)
        if answer.status_code in (400, 500) and not _NO_RUNNER.search(_words(answer)):
            raise RenderRefused(_words(answer))
        self._check(answer, f"{name} was not rendered by Ollama at {self.host}")
        return str(answer.json()["_debug_info"]["rendered_template"])

    def chat(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Ask, and wait for the whole answer: content, done_reason, prompt_eval_count, eval_count."""
        body = _chat_body(name, messages, tools) | {"options": dict(options or {}), "stream": False}
        answer = self._ask("POST", "/api/chat", json=body).json()
        return {**answer, "content": answer["message"].get("content") or ""}

    def stream(
        self, name: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> Iterator[str]:
        """Ask, and yield the answer piece by piece; `options` go before the model's own."""
        for step in self._stream("/api/chat", _chat_body(name, messages) | {"options": dict(options or {})}):
            yield step["message"].get("content") or ""

    def show(self, name: str) -> dict[str, Any]:
        """Everything that `/api/show` says: template, system, parameters, capabilities, requires, model_info, ..."""
        answer = self._send("POST", "/api/show", json={"model": name})
        self._check(answer, f"{name} cannot be shown by Ollama at {self.host}")
        return dict(answer.json())

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name; one that had this name loses it."""
        self._ask("POST", "/api/copy", json={"source": source, "destination": destination})

    def delete(self, name: str) -> None:
        """Take a name away, and the files that no other model uses."""
        self._ask("DELETE", "/api/delete", json={"model": name})

    def load(self, name: str) -> None:
        """Have the server start what answers for a model.

        Raises:
            PipelineError: it cannot be started; with the words of the program that ended.
        """
        self._ask("POST", "/api/chat", json={"model": name, "messages": []})

    def unload(self, name: str) -> None:
        """Make the server let go of the model's memory."""
        self._send("POST", "/api/chat", json={"model": name, "messages": [], "keep_alive": 0})

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer to a request, whatever its status."""
        import httpx

        try:
            return self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise self._silent(error) from None

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer to a request that has to succeed."""
        answer = self._send(method, path, **options)
        self._check(answer, f"Ollama at {self.host}")
        return answer

    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON values of an answer that comes line by line."""
        import httpx

        try:
            with self._http.stream("POST", path, json=body) as answer:
                if not answer.is_success:
                    answer.read()
                self._check(answer, f"Ollama at {self.host}")
                for line in lines(answer.iter_bytes()):
                    step = json.loads(line)
                    if error := step.get("error"):
                        raise PipelineError(f"Ollama at {self.host}: {_helped(error)}")
                    yield step
        except httpx.HTTPError as error:
            raise self._silent(error) from None
        except ValueError:  # a line that was cut off
            raise PipelineError(f"Ollama at {self.host} stopped answering: its answer breaks off") from None

    def _silent(self, error: Exception) -> PipelineError:
        return PipelineError(f"Ollama at {self.host} stopped answering: {error or type(error).__name__}")

    @staticmethod
    def _check(answer: httpx.Response, what: str) -> None:
        if not answer.is_success:
            raise PipelineError(f"{what}: {_words(answer)}")


def _chat_body(
    name: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), think: bool | None = None
) -> dict[str, Any]:
    body: dict[str, Any] = {"model": name, "messages": [dict(message) for message in messages]}
    if tools:
        body["tools"] = [dict(tool) for tool in tools]
    if think is not None:
        body["think"] = think
    return body


# What Ollama says with status 500 where it is not the template that failed.
_NO_RUNNER = re.compile(r"terminated|not responding|no longer running|connection refused|EOF|timed out", re.I)
# What a status means that does not come from Ollama, whose own refusals are JSON, but from a proxy in front of it.
_STATUSES = {
    401: "a user name and a password are wanted, or these are wrong: set the variable OLLAMA_HOST to the address with "
    "them, as in http://user:password@host:port",
    403: "this is not allowed here: see the settings of the proxy in front of Ollama",
    404: "there is no Ollama at this path: give the path below which the proxy has it, as in http://host/ollama",
    407: "the proxy that HTTP_PROXY names wants a user name and a password, or these are wrong: give it as "
    "http://user:password@proxy:port, or name Ollama's host in NO_PROXY",
    413: "the proxy in front of Ollama takes no file of this size: raise its limit (in nginx: client_max_body_size 0;)",
    **dict.fromkeys((301, 302, 307, 308), "the address has moved: give the new one as ollama.host or OLLAMA_HOST"),
    **dict.fromkeys((502, 503, 504), "the proxy in front of Ollama does not reach it, or does not wait long enough"),
}


def _words(answer: httpx.Response) -> str:
    """Why a request failed: Ollama's own words, else what the status means. A proxy's page of HTML is left out."""
    try:
        return _helped(str(answer.json()["error"]))
    except (ValueError, KeyError, TypeError):
        pass
    status = f"HTTP status {answer.status_code} {answer.reason_phrase}".rstrip()
    if meaning := _STATUSES.get(answer.status_code):
        to = f" ({answer.headers['location']})" if "location" in answer.headers else ""
        return f"{status}{to}: {meaning}"
    text = " ".join(answer.text.split())
    return f"{status}: {text[:200]}" if text and not text.startswith("<") else status


def _helped(words: str) -> str:
    disk = "the disk that holds Ollama's models (OLLAMA_MODELS)"
    if NO_SPACE.search(words):
        return f"{words}; free some of {disk}"
    if "llama-quantize failed" in words:
        return f"{words}; most likely {disk} is full: it must hold the model twice; if it can, see Ollama's own log"
    return words

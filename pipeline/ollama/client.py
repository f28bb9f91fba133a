"""What is asked of an Ollama server: the official client, and over plain HTTP the four things that it lacks.

Those are the debug rendering of a prompt, REQUIRES, the upload of a file with progress, and the whole answer of
`/api/show`. Every failure ends in one message that says what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.programs import require_space
from pipeline.ollama.server import DEFAULT_HOST, MINIMUM_VERSION, new_enough
from pipeline.prompt.conformance import RenderRefused
from pipeline.resources import sha256_of

if TYPE_CHECKING:
    import httpx
    import ollama

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_SPACE = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.:-]*"
_NAME = re.compile(rf"(?:(?:{_HOST}/)?{_SPACE}/)?(?P<model>{_PART})(?::(?P<tag>{_PART}))?")
_DOMAIN = re.compile(r"[\w-]{1,63}(\.[\w-]{1,63})*\.?")

_FILTERED = "deepseek-r1"  # filterThinkTags in Ollama's server/routes.go
_ELSEWHERE = re.compile(r"local|(.*-)?cloud", re.IGNORECASE)  # parseSourceSuffix in its internal/modelref/modelref.go


def check_name(name: str) -> str:
    """A model's name with its tag, e.g. "home" -> "home:latest".

    Raises:
        UserError: Ollama would not take the name, would send a model of this name another prompt, or would ask another
            model than this one.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"ollama.name = {name!r}: not a name that Ollama takes; use letters, digits, '_', '-' and '.', at most 80 "
            "of them, with an optional namespace and tag: namespace/model:tag"
        )
    if match["model"].lower() == _FILTERED:
        raise UserError(
            f"ollama.name = {name!r}: from a model of this very name Ollama drops the thinking of earlier answers, "
            f'whatever it was trained with; choose another, e.g. "{_FILTERED}-home"'
        )
    if match["tag"] and _ELSEWHERE.fullmatch(match["tag"]):
        raise UserError(
            f"ollama.name = {name!r}: Ollama takes the tag {match['tag']!r} for where a model runs, and would ask "
            "another one, here or in a cloud; choose a tag that is not local or cloud and does not end in -cloud"
        )
    return name if match["tag"] else f"{name}:latest"


def canonical(name: str) -> str:
    """One spelling for all the names that Ollama takes for the same model (getExistingName in its server/routes.go).

    Case makes no difference to it, and "home", "library/home:latest" and "registry.ollama.ai/library/home" are one.
    """
    tagged = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    return tagged.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")


class Client:
    """An Ollama server.

    Args:
        host: its address; "127.0.0.1:11434", "http://..." and a bare host name are all fine.

    Raises:
        UserError: the address is none, nothing answers there, or it is too old.
    """

    def __init__(self, host: str | None = None) -> None:
        import httpx
        import ollama

        self.host = normal_host(host or DEFAULT_HOST)
        self._http = httpx.Client(base_url=self.host, timeout=httpx.Timeout(600, connect=5), trust_env=False)
        self._official: ollama.Client = ollama.Client(host=self.host, timeout=600, trust_env=False)
        try:
            answer = self._http.get("/api/version", timeout=5)
            self.version = str(answer.json()["version"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"no Ollama answers at {self.host} ({type(error).__name__}); start it with `ollama serve`"
            ) from None
        if not new_enough(self.version):
            raise UserError(
                f"Ollama {self.version} at {self.host} is too old: {MINIMUM_VERSION} or newer is needed; update it"
            )

    def names(self) -> dict[str, str]:
        """The models on the server: name with tag -> digest of the manifest."""
        models = self._call(self._official.list).models
        return {model.model: model.digest or "" for model in models if model.model}

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
        fields = {"from_" if key == "from" else key: value for key, value in body.items() if key != "requires"}
        stream = self._call(self._official.create, name, **fields, stream=True)
        for step in self._steps(stream):
            progress(step.status or "", (step.completed or 0) / step.total if step.total else 0.0)
        if requires := body.get("requires"):
            # The official client has no REQUIRES: said of the model that now exists, which copies nothing.
            answer = self._post("/api/create", {"model": name, "from": name, "requires": requires, "stream": False})
            self._check(answer, f"`requires` of {name} was not taken")

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
        """
        import httpx

        digest, size = f"sha256:{sha256_of(path)}", path.stat().st_size
        there = self._call(self._http.head, f"/api/blobs/{digest}").status_code == httpx.codes.OK
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
            answer = self._http.post(f"/api/blobs/{digest}", content=pieces())
        except httpx.HTTPError as error:
            raise PipelineError(
                f"{path.name} could not be given to Ollama at {self.host}: {error}; see whether its disk is full "
                f"({size / 1e9:.1f} GB are needed, and as much again while it checks them)"
            ) from None
        self._check(answer, f"{path.name} was not taken by Ollama")
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
        """
        body = self._chat_body(name, messages, tools, think) | {"_debug_render_only": True, "truncate": False}
        answer = self._post("/api/chat", body)
        if not answer.is_success:
            raise RenderRefused(_error_text(answer))
        return str(answer.json()["_debug_info"]["rendered_template"])

    def chat(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        think: bool | None = None,
    ) -> dict[str, Any]:
        """Ask, and wait for the whole answer: content, done_reason, prompt_eval_count, eval_count."""
        extra: dict[str, Any] = {"options": dict(options)} if options else {}
        answer = self._call(self._official.chat, **self._chat_body(name, messages, tools, think), **extra, stream=False)
        return dict(answer.model_dump()) | {"content": answer.message.content or ""}

    def stream(self, name: str, messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """Ask, and yield the answer piece by piece."""
        for piece in self._steps(self._call(self._official.chat, name, list(messages), stream=True)):
            yield piece.message.content or ""

    def show(self, name: str) -> dict[str, Any]:
        """Everything that `/api/show` says: template, system, parameters, capabilities, requires, model_info, ..."""
        answer = self._post("/api/show", {"model": name})
        self._check(answer, f"{name} cannot be shown")
        return dict(answer.json())

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name; one that had this name loses it."""
        self._call(self._official.copy, source, destination)

    def delete(self, name: str) -> None:
        """Take a name away, and the files that no other model uses."""
        self._call(self._official.delete, name)

    def unload(self, name: str) -> None:
        """Make the server let go of the model's memory."""
        self._post("/api/chat", {"model": name, "messages": [], "keep_alive": 0})

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _chat_body(
        name: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        think: bool | None,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": name, "messages": [dict(message) for message in messages]}
        if tools:
            body["tools"] = [dict(tool) for tool in tools]
        if think is not None:
            body["think"] = think
        return body

    def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        answer: httpx.Response = self._call(self._http.post, path, json=body)
        return answer

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        import httpx
        import ollama

        try:
            return function(*arguments, **options)
        except ollama.ResponseError as error:
            raise PipelineError(f"Ollama at {self.host}: {_helped(error.error)}") from None
        except (httpx.HTTPError, ConnectionError) as error:
            raise PipelineError(f"Ollama at {self.host} stopped answering: {error or type(error).__name__}") from None

    def _steps(self, stream: Iterator[Any]) -> Iterator[Any]:
        """The stream's items, its failures being ours."""
        ended = object()
        while (step := self._call(next, stream, ended)) is not ended:
            yield step

    def _check(self, answer: httpx.Response, what: str) -> None:
        if not answer.is_success:
            raise PipelineError(f"{what}: {_helped(_error_text(answer))} (Ollama {self.version} at {self.host})")


def normal_host(host: str, source: str = "ollama.host") -> str:
    """An address as a URL with a port, the way Ollama itself reads OLLAMA_HOST.

    Args:
        host: the address.
        source: where it was given, for the message.

    Raises:
        UserError: it is no address.
    """
    from ipaddress import IPv6Address
    from urllib.parse import urlsplit

    text = host.strip(" \t\r\n\"'")
    if text.startswith(":") and not text.startswith("://"):  # ":11435" is a port of this machine
        text = f"127.0.0.1{text}"
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port, name = parts.port, parts.hostname or ""
        named = _DOMAIN.fullmatch(name) or (":" in name and IPv6Address(name))
    except ValueError:
        named = None
    if not named or parts.scheme not in ("http", "https") or re.search(r"\s", text):  # urlsplit leaves some of it out
        raise UserError(f"{source} = {host!r}: not an address; write e.g. http://127.0.0.1:11434")
    name = f"[{name}]" if ":" in name else name
    if name == "0.0.0.0":  # noqa: S104 - an address to listen on, not one to call
        name = "127.0.0.1"
    default = {"http": 80, "https": 443}[parts.scheme] if "://" in text else 11434
    return f"{parts.scheme}://{name}:{port or default}"


def _error_text(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return answer.text.strip() or f"HTTP status {answer.status_code}"


def _helped(words: str) -> str:
    disk = "the disk that holds Ollama's models (OLLAMA_MODELS)"
    if "no space left" in words or "quota exceeded" in words:
        return f"{words}; free some of {disk}"
    if "llama-quantize failed" in words:
        return f"{words}; most likely {disk} is full: it must hold the model twice; if it can, see Ollama's own log"
    return words

"""llama-server as a context manager: started on a free loopback port, asked over HTTP, stopped by its process id.

It is set up to answer the same way every time: one slot, no reuse of an earlier prompt's cache (whose other batch
shapes round differently), temperature 0.
"""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipeline.errors import PipelineError, UserError
from pipeline.lines import lines
from pipeline.llamacpp.programs import lora_arguments, program
from pipeline.processes import ON_THIS_MACHINE, cores, failure, free_port, start, stop, wait_until

if TYPE_CHECKING:
    import httpx

START_SECONDS = 600


class Refused(PipelineError):
    """llama-server runs and does not do what it is asked: it cannot read a file, or render a template so."""


class LlamaServer:
    """A GGUF file, served.

    Args:
        model: the GGUF file.
        adapters: LoRA adapters as GGUF, applied at scale 1 where a request does not say otherwise in its field `lora`.
        context: tokens of context.
        jinja: use the GGUF's own Jinja chat template.
        template: a Jinja chat template to use instead of it.
        log: where llama-server's log is kept, and `template` beside it, as *.jinja, so that `command` can be typed
            again; without it, in temporary files that are removed at the end.
        threads: threads to compute with; 0 for one a core.

    Raises (on entering):
        UserError: the file does not exist.
        PipelineError: llama-server cannot load it, with what it said.

    Attributes:
        url: the server's address, e.g. "http://127.0.0.1:45831".
        command: the argument list that it was started with.
        process: the running program.
    """

    client: "httpx.Client"
    process: "subprocess.Popen[bytes]"

    def __init__(
        self,
        model: Path,
        *,
        adapters: Sequence[Path] = (),
        context: int = 4096,
        jinja: bool = True,
        template: str | None = None,
        log: Path | None = None,
        threads: int = 0,
    ) -> None:
        self.model = model
        self.adapters = tuple(adapters)
        self.context = context
        self.jinja = jinja
        self.template = template
        self.log = log
        self.threads = threads or cores()
        self.url = ""
        self.command: list[str] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for path in (self.model, *self.adapters):
            if not path.is_file():
                raise UserError(f"{path}: no such file")
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        import httpx

        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llama-server-")))
        if self.log is None:
            self.log = scratch / "llama-server.log"
            stack.callback(setattr, self, "log", None)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.command = [
            *(str(program("llama-server")), "--model", str(self.model)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--ctx-size", str(self.context), "--parallel", "1", "--threads", str(self.threads)),
            *("--cache-ram", "0", "--no-context-shift", "--fit", "off", "--no-ui", "--offline"),
            "--jinja" if self.jinja else "--no-jinja",
            *lora_arguments(self.adapters),
        ]
        if self.template is not None:
            file = self.log.with_suffix(".jinja")
            file.write_bytes(self.template.encode())
            self.command += ["--chat-template-file", str(file)]
        log = stack.enter_context(self.log.open("wb"))
        self.process = start(self.command, log)
        stack.callback(stop, self.process)
        # One connection, kept open: a new one for every request would cost more than the request.
        self.client = stack.enter_context(
            httpx.Client(base_url=self.url, timeout=httpx.Timeout(10, read=600), **ON_THIS_MACHINE)
        )
        self._wait()

    def _wait(self) -> None:
        if not wait_until(self._ready, self.process, START_SECONDS):
            status = self.process.poll()
            if status is not None and status < 0:
                raise failure(f"llama-server, loading {self.model}", status, self._said())
            if status is not None:
                raise Refused(f"llama-server cannot load {self.model}{self._reason()}")
            raise PipelineError(f"llama-server has not loaded {self.model} in {START_SECONDS} s{self._reason()}")

    def _ready(self) -> bool:
        import httpx

        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/health").status_code == httpx.codes.OK
        return False

    def _said(self) -> list[str]:
        assert self.log is not None
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def _reason(self) -> str:
        said = self._said()
        telling = [line.strip() for line in said if "error" in line.lower() or "failed" in line.lower()]
        return ":\n  " + "\n  ".join((telling or said)[-6:])

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        import httpx

        try:
            response = self.client.post(path, json=body)
        except httpx.HTTPError as error:
            ended = self.process.poll()
            state = f" (llama-server ended with {ended}){self._reason()}" if ended is not None else ""
            raise PipelineError(f"llama-server, {path}: {error or type(error).__name__}{state}") from error
        if response.is_error:
            raise Refused(f"llama-server, {path}: {_words(response.content)}")
        answer: dict[str, Any] = response.json()
        return answer

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            text: any text that UTF-8 can hold.
            add_special: put BOS and EOS where the tokenizer wants them.
            parse_special: read the text of a special token as that token.
        """
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        ids: list[int] = self._post("/tokenize", body)["tokens"]
        return ids

    def apply_template(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> str:
        """The prompt that llama.cpp renders from the GGUF's chat template.

        Args:
            messages: the conversation.
            fields: other fields of a chat request, e.g. tools, chat_template_kwargs, add_generation_prompt.
        """
        prompt: str = self._post("/apply-template", {"messages": list(messages), **fields})["prompt"]
        return prompt

    def complete(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        temperature: float = 0,
        n_probs: int = 0,
        stop: Sequence[str] = (),
        **fields: Any,
    ) -> dict[str, Any]:
        """Continue a prompt.

        Args:
            prompt: text, or token ids, which are taken as they are.
            max_tokens: longest continuation.
            temperature: 0 takes the likeliest token every time.
            n_probs: log probabilities of this many tokens for each position, in "completion_probabilities".
            stop: texts that end the answer.
            fields: other fields of llama-server's /completion.

        Returns:
            llama-server's answer: "content", "tokens" (ids), "stop_type" ("eos", "word" or "limit"), "timings"...
        """
        body = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "n_predict": max_tokens,
            "temperature": temperature,
            "n_probs": n_probs,
            "stop": list(stop),
            "seed": 0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        return self._post("/completion", body | fields)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], max_tokens: int, temperature: float = 0, **fields: Any
    ) -> str:
        """The assistant's answer to a conversation, as text."""
        body = {
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": 0,
            "cache_prompt": False,
        }
        answer = self._post("/v1/chat/completions", body | fields)
        return answer["choices"][0]["message"].get("content") or ""

    def stream(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """The assistant's answer to a conversation, piece by piece (server-sent events).

        Raises:
            PipelineError: the server refuses, breaks off or ends; with its words.
        """
        yield from stream_chat(self.client, {"messages": list(messages), "temperature": 0})


def stream_chat(client: "httpx.Client", body: Mapping[str, Any]) -> Iterator[str]:
    """An answer by OpenAI's API, piece by piece (server-sent events).

    Args:
        client: of a llama-server, or of what stands in front of one.
        body: the request.

    Raises:
        PipelineError: the server refuses, breaks off or ends; with its words.
    """
    import httpx

    # A stream ends when the connection is closed, so it is not kept for the next question.
    headers = {"Connection": "close"}
    try:
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}, headers=headers) as answer:
            if answer.is_error:
                raise PipelineError(f"llama-server refuses to answer: {_words(answer.read())}")
            for line in lines(answer.iter_bytes()):
                if not line.startswith(b"data: {"):
                    continue
                data = line.removeprefix(b"data: ")
                event = json.loads(data)
                if "error" in event:
                    raise PipelineError(f"llama-server refuses to answer: {_words(data)}")
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        raise PipelineError(f"llama-server stopped answering: {error or type(error).__name__}") from None


def _words(body: bytes) -> str:
    """What llama-server says of a request that it refuses."""
    try:
        return str(json.loads(body)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:500]

"""llama-server as a context manager: started on a free loopback port, asked over HTTP, stopped by its process id.

It is set up to answer the same way every time: one slot, no reuse of an earlier prompt's cache (whose other batch
shapes round differently), temperature 0.
"""

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.programs import die_with_parent, program

if TYPE_CHECKING:
    import httpx

START_SECONDS = 600


class LlamaServer:
    """A GGUF file, served.

    Args:
        model: the GGUF file.
        adapter: a LoRA adapter as GGUF, applied at scale 1.
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
        adapter: Path | None = None,
        context: int = 4096,
        jinja: bool = True,
        template: str | None = None,
        log: Path | None = None,
        threads: int = 0,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.context = context
        self.jinja = jinja
        self.template = template
        self.log = log
        self.threads = threads or len(os.sched_getaffinity(0))
        self.url = ""
        self.command: list[str] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for path in (self.model, self.adapter):
            if path is not None and not path.is_file():
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
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.command = [
            *(str(program("llama-server")), "--model", str(self.model)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--ctx-size", str(self.context), "--parallel", "1", "--threads", str(self.threads)),
            *("--cache-ram", "0", "--no-context-shift", "--fit", "off", "--no-ui", "--offline"),
            "--jinja" if self.jinja else "--no-jinja",
        ]
        if self.adapter is not None:
            self.command += ["--lora", str(self.adapter)]
        if self.template is not None:
            file = self.log.with_suffix(".jinja")
            file.write_bytes(self.template.encode())
            self.command += ["--chat-template-file", str(file)]
        log = stack.enter_context(self.log.open("wb"))
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        stack.callback(self._stop)
        # One connection, kept open: a new one for every request would cost more than the request.
        self.client = stack.enter_context(
            httpx.Client(base_url=self.url, timeout=httpx.Timeout(10, read=600), trust_env=False)
        )
        self._wait()

    def _wait(self) -> None:
        import httpx

        deadline = time.monotonic() + START_SECONDS
        pause = 0.01
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise PipelineError(f"llama-server cannot load {self.model}{self._reason()}")
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health").status_code == httpx.codes.OK:
                    return
            time.sleep(pause)
            pause = min(0.2, pause * 1.5)
        raise PipelineError(f"llama-server did not load {self.model} in {START_SECONDS} s{self._reason()}")

    def _reason(self) -> str:
        assert self.log is not None
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        telling = [line.strip() for line in lines if "error" in line.lower() or "failed" in line.lower()]
        return ":\n  " + "\n  ".join((telling or lines)[-6:])

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        import httpx

        try:
            response = self.client.post(path, json=body)
        except httpx.HTTPError as error:
            ended = self.process.poll()
            state = f" (llama-server ended with {ended}){self._reason()}" if ended is not None else ""
            raise PipelineError(f"llama-server, {path}: {error or type(error).__name__}{state}") from error
        if response.is_error:
            try:
                message = response.json()["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = response.text[:500]
            raise PipelineError(f"llama-server, {path}: {message}")
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""stopping: an answer ends by itself, at the end-of-turn token, through every server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pipeline.console import progress
from pipeline.errors import PipelineError
from pipeline.llamacpp.server import LlamaServer
from pipeline.ollama.serving import deployed
from pipeline.ollama.suite import for_ollama
from pipeline.verify.result import Claim, Result
from pipeline.verify.subject import Subject

_SENTENCE = "answers end by themselves"


def check(subject: Subject) -> Iterator[Result]:
    """Ask every GGUF file through llama-server, and the deployed model through Ollama."""
    limit = subject.config.eval.max_new_tokens if subject.config is not None else 256
    for rung, path in subject.files:
        claim = Claim("stopping.llamacpp", rung, f"{_SENTENCE} in llama-server")
        try:
            with LlamaServer(path, context=4096) as server:
                yield _ask(subject, claim, partial(_ended, server, subject, limit))
        except PipelineError as error:
            yield claim.holds(False, f"llama-server cannot use it: {error}")
    yield from _ollama(subject, limit)


def _ended(server: LlamaServer, subject: Subject, limit: int, messages: list[dict[str, Any]]) -> bool:
    prompt = subject.template.served(subject.template.render(messages))
    ids = server.tokenize(prompt, add_special=True)
    return bool(server.complete(ids, limit)["stop_type"] == "eos")


def _ollama(subject: Subject, limit: int) -> Iterator[Result]:
    claim = Claim("stopping.ollama", "deploy", f"{_SENTENCE} in Ollama")
    if subject.run is None or not (subject.run / "deploy" / "deploy.json").is_file():
        yield claim.not_run("nothing was deployed")
        return
    options = {"temperature": 0, "num_predict": limit}
    try:
        with deployed(subject.run, log=subject.scratch / "ollama.log") as served:
            if served is None:
                yield claim.not_run("there was no Ollama to deploy to")
                return
            client, name = served
            yield _ask(
                subject,
                claim,
                lambda messages: client.chat(name, for_ollama(messages), options=options).get("done_reason") == "stop",
            )
    except PipelineError as error:
        yield claim.holds(False, str(error))


def _ask(subject: Subject, claim: Claim, ended: Callable[[list[dict[str, Any]]], bool]) -> Result:
    questions = subject.questions[: subject.settings.stopping_prompts]
    stopped = 0
    with progress(f"stopping at {claim.rung}", len(questions), "answers") as update:
        for number, messages in enumerate(questions, 1):
            stopped += ended(messages)
            update(number)
    share = stopped / len(questions)
    words = f"{stopped} of {len(questions)} answers ended before the limit"
    return claim.at_least(share, subject.settings.stopping, words)

"""stopping: an answer ends by itself, at the end-of-turn token, through every server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pipeline.console import progress
from pipeline.errors import PipelineError
from pipeline.llamacpp.server import LlamaServer
from pipeline.ollama.serving import deployed
from pipeline.prompt.conformance import for_ollama
from pipeline.run.layout import Layout
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result

_SENTENCE = "answers end by themselves"


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Ask every GGUF file through llama-server, and the deployed model through Ollama."""
    limit = artefacts.config.eval.max_new_tokens if artefacts.config is not None else 256
    for rung, path in artefacts.files:
        claim = Claim("stopping.llamacpp", rung, f"{_SENTENCE} in llama-server")
        try:
            with LlamaServer(path, context=4096) as server:
                yield _ask(artefacts, claim, partial(_ended, server, artefacts, limit))
        except PipelineError as error:
            yield claim.holds(False, f"llama-server cannot use it: {error}")
    yield from _ollama(artefacts, limit)


def _ended(server: LlamaServer, artefacts: Artefacts, limit: int, messages: list[dict[str, Any]]) -> bool:
    prompt = artefacts.template.served(artefacts.template.render(messages))
    ids = server.tokenize(prompt, add_special=True)
    return bool(server.complete(ids, limit)["stop_type"] == "eos")


def _ollama(artefacts: Artefacts, limit: int) -> Iterator[Result]:
    claim = Claim("stopping.ollama", "deploy", f"{_SENTENCE} in Ollama")
    if artefacts.run is None or not Layout(artefacts.run).deployment.is_file():
        yield claim.not_run("nothing was deployed")
        return
    options = {"temperature": 0, "num_predict": limit}
    try:
        with deployed(artefacts.run, log=artefacts.scratch / "ollama.log") as served:
            if served is None:
                yield claim.not_run("there was no Ollama to deploy to")
                return
            client, name = served
            yield _ask(
                artefacts,
                claim,
                lambda messages: client.chat(name, for_ollama(messages), options=options).get("done_reason") == "stop",
            )
    except PipelineError as error:
        yield claim.holds(False, str(error))


def _ask(artefacts: Artefacts, claim: Claim, ended: Callable[[list[dict[str, Any]]], bool]) -> Result:
    questions = artefacts.questions[: artefacts.settings.stopping_prompts]
    stopped = 0
    with progress(f"stopping at {claim.rung}", len(questions), "answers") as update:
        for number, messages in enumerate(questions, 1):
            stopped += ended(messages)
            update(number)
    share = stopped / len(questions)
    words = f"{stopped} of {len(questions)} answers ended before the limit"
    return claim.at_least(share, artefacts.settings.stopping, words)

"""stopping: an answer ends by itself, at the end-of-turn token, through every server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pipeline.console import progress
from pipeline.data.questions import Question
from pipeline.errors import PipelineError
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.model.facts import context_of
from pipeline.ollama.client import Client
from pipeline.ollama.deployment import askable, deployed
from pipeline.ollama.serving import context_for
from pipeline.prompt.conformance import for_ollama
from pipeline.prompt.template import TemplateRefused
from pipeline.run.layout import Layout
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result

_SENTENCE = "answers end by themselves"


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Ask every GGUF file through llama-server, and the deployed model through Ollama."""
    limit = artefacts.longest_answer
    taken, refused = _taken(artefacts)
    context = context_for(artefacts.tokenizer, taken, limit, context_of(artefacts.model))
    adapters = [artefacts.gguf_adapter] if artefacts.gguf_adapter else []
    for stage, path in artefacts.files:
        claim = Claim("stopping.llamacpp", stage, f"{_SENTENCE} in llama-server")
        if not taken:
            yield claim.not_run(refused)
            continue
        try:
            # It is sent token ids.
            with LlamaServer(path, adapters=adapters, context=context, jinja=False) as server:
                yield _ask(artefacts, claim, taken, partial(_ended, server, artefacts, limit), refused)
        except PipelineError as error:
            yield claim.holds(False, f"llama-server cannot use it: {error}")
    yield from _ollama(artefacts, limit, taken, refused)


def _taken(artefacts: Artefacts) -> tuple[list[Question], str]:
    """The questions that the chat template takes, and the first refusal of one that it does not, with its place."""
    taken, refused = [], ""
    if not artefacts.questions:
        return [], "the run's rows are whole texts, which ask nothing"
    for question in artefacts.questions:
        try:
            artefacts.template.render(question.messages, question.tools)
        except TemplateRefused as refusal:
            refused = refused or f"{question.place}: {refusal}"
        else:
            taken.append(question)
    return taken, refused


def _ended(server: LlamaServer, artefacts: Artefacts, limit: int, question: Question) -> bool:
    prompt = artefacts.template.served(artefacts.template.render(question.messages, question.tools))
    ids = server.tokenize(prompt, add_special=True)
    return bool(server.complete(ids, limit)["stop_type"] == "eos")


def _ollama(artefacts: Artefacts, limit: int, taken: Sequence[Question], refused: str) -> Iterator[Result]:
    claim = Claim("stopping.ollama", "deploy", f"{_SENTENCE} in Ollama")
    if artefacts.run is None or not Layout(artefacts.run).deployment.is_file():
        yield claim.not_run("nothing was deployed")
        return
    try:
        with deployed(artefacts.run, log=artefacts.scratch / "ollama.log") as served:
            if served is None:
                yield claim.not_run("there was no Ollama to deploy to")
                return
            client, name = served
            questions = askable(taken, client.show(name).get("capabilities", ()))
            if questions:
                yield _ask(artefacts, claim, questions, partial(_ended_in_ollama, client, name, limit), refused)
            else:
                yield claim.not_run(refused or "every question has tools, and Ollama gives this model none")
    except PipelineError as error:
        yield claim.holds(False, str(error))


def _ended_in_ollama(client: Client, name: str, limit: int, question: Question) -> bool:
    options: dict[str, Any] = {"temperature": 0, "num_predict": limit}
    answer = client.chat(name, for_ollama(question.messages), tools=question.tools or (), options=options)
    return bool(answer.get("done_reason") == "stop")


def _ask(
    artefacts: Artefacts, claim: Claim, questions: Sequence[Question], ended: Callable[[Question], bool], refused: str
) -> Result:
    stopped = 0
    with progress(f"stopping at {claim.stage}", len(questions), "answers") as update:
        for number, question in enumerate(questions, 1):
            stopped += ended(question)
            update(number)
    words = f"{stopped} of {len(questions)} answers ended before the limit"
    words += f"; not asked: {refused}" if refused else ""
    return claim.at_least(stopped / len(questions), artefacts.settings.stopping, words)

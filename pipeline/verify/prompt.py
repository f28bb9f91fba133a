"""prompt: transformers, llama.cpp and Ollama make the same bytes, and the same ids, of every conversation of the suite.

The measure is the template that was trained. The GGUF files are asked through llama-server; what the Modelfile says is
tried in a real Ollama, and so is the model that was deployed, as it is now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.llamacpp.tokenizer_differences import known_habit
from pipeline.ollama.deployment import deployed, deployed_plan, differences, template_in_force
from pipeline.ollama.llamacpp_rendering import Carried, ask_llama_server, carried_template
from pipeline.ollama.modelfile_text import served_system
from pipeline.ollama.parameters import stop_strings
from pipeline.ollama.rendering import Engine, explain
from pipeline.prompt.cases import Case, conversations
from pipeline.prompt.conformance import Report, for_ollama, judge
from pipeline.prompt.guard import FOREIGN, guarded
from pipeline.prompt.template import ChatTemplate, TemplateRefused, token_ids
from pipeline.run.layout import Layout
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge every GGUF file, every Modelfile and the deployed model."""
    yield from check_files(artefacts)
    if artefacts.tokenizer.chat_template:
        suite = conversations(artefacts.template.special_tokens)
        yield from _modelfiles(artefacts, suite)
        yield from _deployed(artefacts, suite)


def check_files(artefacts: Artefacts) -> Iterator[Result]:
    """Judge the chat template of every GGUF file."""
    if not artefacts.tokenizer.chat_template:
        yield Claim("prompt.template", "base", "there is a chat template").holds(
            False, f"{artefacts.model} has no chat template: there is nothing to say how a conversation is sent"
        )
        return
    suite = conversations(artefacts.template.special_tokens)
    for stage, path in artefacts.files:
        yield from check_file(artefacts.template, artefacts.tokenizer, stage, path, suite)


def check_file(
    template: ChatTemplate, tokenizer: Any, stage: str, path: Path, suite: Sequence[Case]
) -> Iterator[Result]:
    """Judge the chat template of one GGUF file.

    Args:
        template: the trained one.
        tokenizer: the trained one, of transformers.
        stage: whose output the file is.
        path: the file.
        suite: the conversations that are compared.
    """
    carried = Claim("prompt.template", stage, "the GGUF file carries the trained chat template, byte for byte")
    derived = Claim("prompt.template", stage, "the GGUF file carries what llama.cpp can do of the chat template")
    rendered = Claim("prompt.llamacpp", stage, "llama.cpp renders the trained prompt")
    tokens = Claim("prompt.tokens", stage, "a served prompt has the trained ids, BOS included")
    try:
        source = inspect(path).metadata.get("tokenizer.chat_template")
    except PipelineError as error:
        yield from (claim.not_run(f"the file cannot be read: {error}") for claim in (carried, rendered, tokens))
        return
    served = template.with_source(source if isinstance(source, str) else "")
    meant = Carried(template.source) if source == template.source else carried_template(template)
    claim = derived if meant.left_out else carried
    yield claim.holds(source == meant.jinja, _template_difference(source, meant.jinja), meant.left_out or None)
    try:
        bare = _bare(template, served, path, suite)
        shipped = guarded(source, thinking_not_said=True) if isinstance(source, str) else None
        with LlamaServer(path, context=256, template=shipped) as server:
            report = judge(template, suite, lambda case: ask_llama_server(server, served, case), joins=False)
            yield _judged(rendered, report, f"guarded as it is served: {report.summary}; bare: {bare}" if bare else "")
            yield from _same_tokens(tokens, template, tokenizer, server, suite)
    except PipelineError as error:
        yield rendered.holds(False, f"llama-server cannot use it: {error}")


def _bare(template: ChatTemplate, served: ChatTemplate, path: Path, suite: Sequence[Case]) -> str:
    """What a llama-server makes of the file by itself, where it gives a template what transformers does not give it."""
    if not any(name in served.source for name in (*FOREIGN, "enable_thinking")):
        return ""
    try:
        with LlamaServer(path, context=256) as server:
            return judge(template, suite, lambda case: ask_llama_server(server, served, case), joins=False).summary
    except PipelineError as error:
        return f"refused: {str(error).splitlines()[-1]}"


def _template_difference(ours: Any, theirs: str) -> str:
    if not isinstance(ours, str):
        return "it carries none"
    at = len(os.path.commonprefix([ours, theirs]))
    return f"from character {at} it is {ours[at : at + 40]!r} instead of {theirs[at : at + 40]!r}"


def _judged(claim: Claim, report: Report, summary: str = "") -> Result:
    difference = report.first_difference()
    words = explain(difference) if difference else "no conversation could be compared"
    return claim.holds(report.exact, words, summary or report.summary, "no difference")


def _same_tokens(
    claim: Claim, template: ChatTemplate, tokenizer: Any, server: LlamaServer, suite: Sequence[Case]
) -> Iterator[Result]:
    differing, compared, words = 0, 0, ""
    habits: dict[str, list[str]] = {}
    for case in suite:
        try:
            trained = template.render(case.messages, case.tools, case.think)
        except TemplateRefused:
            continue
        compared += 1
        expected = token_ids(tokenizer, trained)
        served = server.tokenize(template.served(trained), add_special=True)
        if served == expected:
            continue
        if habit := known_habit(server, tokenizer, trained, served):
            habits.setdefault(habit, []).append(case.name)
        else:
            differing += 1
            words = words or f"conversation {case.name!r} is served as {served[:8]}, trained as {expected[:8]}"
    more = f" ({differing} of {compared} differ)" if differing else ""
    yield claim.at_most(differing, 0, words + more)
    if habits:
        known = "; ".join(f"{', '.join(map(repr, names))}: {habit}" for habit, names in habits.items())
        sentence = f"left out, because it is known why they are served with other ids: {known}"
        yield Claim("prompt.habits", claim.stage, sentence).holds(
            True, figure=sum(map(len, habits.values())), threshold="explained"
        )


def _modelfiles(artefacts: Artefacts, suite: Sequence[Case]) -> Iterator[Result]:
    rendered = Claim("prompt.modelfile", "modelfile", "what the Modelfile says renders the trained prompt in Ollama")
    if artefacts.run is None:
        yield rendered.not_run("this export has no Modelfile of this program")
        return
    judged: dict[str, Result] = {}
    with Engine() as engine:
        for kind in artefacts.quantized:
            stage = f"modelfile/{kind}"
            claim = Claim(rendered.id, stage, rendered.sentence)
            path = Layout(artefacts.run).create_request(kind)
            if not path.is_file():
                yield claim.not_run(f"{path} is missing")
                continue
            body = json.loads(path.read_text(encoding="utf-8"))["request"]
            yield _stops(artefacts, stage, body)
            yield _system(artefacts, stage, body)
            if not engine.has_go:
                yield claim.not_run("there is no Ollama on this machine: `pipeline setup` builds one")
                continue
            go_template = body.get("template") or ""
            if go_template not in judged:  # the same for every type of a run
                judged[go_template] = _rendered(claim, engine, artefacts.template, go_template, path.parent, suite)
            result = judged[go_template]
            yield Result(**{**vars(result), "stage": stage})


def _rendered(
    claim: Claim, engine: Engine, template: ChatTemplate, go_template: str, folder: Path, suite: Sequence[Case]
) -> Result:
    try:
        # Of the file that is shipped, with what keeps Ollama from replacing it.
        shipped = folder / json.loads((folder / "create.json").read_text(encoding="utf-8"))["gguf"]
        jinja = str(inspect(shipped).metadata["tokenizer.chat_template"])
        if not go_template:
            return _judged(claim, engine.judge_native(template, jinja, suite))
        report = engine.judge_go(template, go_template, suite)
        if report.exact and not engine.uses_go(template.with_source(jinja), go_template):
            return claim.holds(False, "Ollama ignores this TEMPLATE: the model's own Jinja can do more")
    except PipelineError as error:
        return claim.holds(False, str(error))
    return _judged(claim, report)


def _stops(artefacts: Artefacts, stage: str, body: dict[str, Any]) -> Result:
    wanted = set(stop_strings(artefacts.template))
    if artefacts.config is not None and "stop" in artefacts.config.ollama.parameters:
        wanted = set()  # the user's own
    missing = sorted(wanted - set((body.get("parameters") or {}).get("stop") or ()))
    claim = Claim("prompt.stop", stage, "every text that ends a turn is a stop string")
    return claim.holds(not missing, f"the stop strings lack {', '.join(map(repr, missing))}", len(missing), "at most 0")


def _system(artefacts: Artefacts, stage: str, body: dict[str, Any]) -> Result:
    """Rows without a system message were trained with data.system; the served model must have it too."""
    claim = Claim("prompt.system", stage, "the served system text is the trained one")
    meant = served_system(artefacts.config) if artefacts.config is not None else ""
    served = body.get("system") or ""
    return claim.holds(served == meant, f"it is {served!r} instead of {meant!r}")


def _deployed(artefacts: Artefacts, suite: Sequence[Case]) -> Iterator[Result]:
    claim = Claim("prompt.ollama", "deploy", "the deployed model is sent the trained prompt")
    told = Claim("prompt.deployed", "deploy", "Ollama says of the deployed model what it was told")
    if artefacts.run is None or not Layout(artefacts.run).deployment.is_file():
        yield claim.not_run("nothing was deployed")
        return
    try:
        with deployed(artefacts.run, log=artefacts.scratch / "ollama.log") as served:
            if served is None:
                yield claim.not_run("there was no Ollama to deploy to")
                return
            client, name = served
            meant, gguf, adapter = deployed_plan(artefacts.run)
            wrong = differences(client.show(name), meant, template_in_force(meant, gguf), adapter)
            yield told.holds(not wrong, "; ".join(wrong), len(wrong), "at most 0")
            report = judge(
                artefacts.template,
                suite,
                lambda case: client.render(name, for_ollama(case.messages), case.tools, case.think),
                joins=bool(meant.template),
                default_system=meant.system,
            )
            yield _judged(claim, report)
    except PipelineError as error:
        yield claim.holds(False, str(error))

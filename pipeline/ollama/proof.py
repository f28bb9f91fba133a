"""The proof that a model on a server is the one that was meant, and that it is sent what was trained.

Everything is read back from the running server: the template in force, the system text, the parameters, the
capabilities; then the prompt of every conversation of the suite, as text and as token ids; then answers.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.llamacpp.server import LlamaServer
from pipeline.llamacpp.tokenizer_differences import known_habit
from pipeline.ollama.client import Client
from pipeline.ollama.modelfile import ServedModel
from pipeline.ollama.rendering import explain
from pipeline.prompt.cases import Conversation
from pipeline.prompt.conformance import COMPARED, EXACT, Report, for_ollama, judge, with_system
from pipeline.prompt.template import ChatTemplate


@dataclass(frozen=True)
class PromptProof:
    """What was compared.

    Attributes:
        report: the suite's results.
        token_equal: how many prompts are served as the token ids that the trained tokenizer makes of them.
        other_ids: conversations that are served other ids, by a known habit of llama.cpp's tokenizer, and which.
    """

    report: Report
    token_equal: int
    other_ids: Mapping[str, str] = field(default_factory=dict)


def read_back(client: Client, name: str, meant: ServedModel, template_in_force: str) -> dict[str, Any]:
    """Compare what the server says of a model with what it was told.

    Args:
        template_in_force: the Go TEMPLATE, or for the native way the Jinja of the GGUF.

    Returns:
        The server's own words: capabilities, parameters, requires, details.

    Raises:
        PipelineError: something is not as it was meant, with both.
    """
    shown = client.show(name)
    wrong = []
    if shown.get("template") != template_in_force:
        wrong.append(f"the template in force is {str(shown.get('template'))[:300]!r}")
    if (shown.get("system") or "") != meant.system:
        wrong.append(f"the system text is {shown.get('system')!r} instead of {meant.system!r}")
    if meant.requires and shown.get("requires") != meant.requires:
        wrong.append(f"REQUIRES is {shown.get('requires')!r} instead of {meant.requires!r}")
    told = shown_parameters(str(shown.get("parameters") or ""))
    for key, value in meant.parameters.items():
        if told.get(key) != (value if isinstance(value, list) else [value]):
            wrong.append(f"parameter {key} is {told.get(key)!r} instead of {value!r}")
    unasked = sorted(told.keys() - meant.parameters.keys())
    if unasked:
        wrong.append(f"it has parameters that nobody asked for: {', '.join(unasked)}")
    if "completion" not in shown.get("capabilities", []):
        wrong.append(f"its capabilities are {shown.get('capabilities')}")
    if wrong:
        raise PipelineError(f"Ollama did not make of {name} what it was told: " + "; ".join(wrong))
    return {
        "capabilities": shown["capabilities"],
        "parameters": told,
        "requires": shown.get("requires"),
        "details": shown.get("details"),
    }


def shown_parameters(text: str) -> dict[str, list[Any]]:
    """The parameters of `/api/show`: lines of a name and a Go literal."""
    values: dict[str, list[Any]] = {}
    for line in text.split("\n"):
        key, _, literal = line.partition(" ")
        literal = {"true": "True", "false": "False"}.get(literal.strip(), literal.strip())
        if key:
            values.setdefault(key, []).append(ast.literal_eval(literal))
    return values


def prove_prompts(
    client: Client,
    name: str,
    template: ChatTemplate,
    tokenizer: Any,
    gguf: Path,
    suite: Sequence[Conversation],
    *,
    joins: bool,
    system: str,
) -> PromptProof:
    """Ask the server for every prompt of the suite, and compare text and token ids with the trained ones.

    Args:
        tokenizer: the trained one, of transformers.
        gguf: the served file; its own vocabulary counts the ids.
        joins: Ollama joins neighbouring messages of one role (Go templates).
        system: the served model's system text.

    Raises:
        PipelineError: with the first difference.
    """
    report = judge(
        template,
        suite,
        lambda case: client.render(name, for_ollama(case.messages), case.tools, case.think),
        joins=joins,
        default_system=system,
    )
    difference = report.first_difference()
    if not report.exact:
        words = explain(difference) if difference else "no conversation could be compared"
        raise PipelineError(f"Ollama sends other prompts than were trained ({report.summary}).\n{words}")
    client.unload(name)
    equal, other = 0, dict[str, str]()
    with LlamaServer(gguf, context=256) as server:
        for case, outcome in zip(suite, report.outcomes, strict=True):
            if outcome.status not in COMPARED:
                continue
            trained = template.render(with_system(case.messages, system), case.tools, case.think)
            prompt = template.served(trained)
            if outcome.status != EXACT:
                # Of a text that is not quite the trained one, the ids still have to be what the trainer made of it.
                trained, prompt = trained.removesuffix(prompt) + outcome.served, outcome.served
            expected = list(tokenizer(trained, add_special_tokens=False).input_ids)
            served = server.tokenize(prompt, add_special=True, parse_special=True)
            if expected == served:
                equal += 1
            elif reason := known_habit(server, tokenizer, trained, prompt, expected, served):
                other[case.name] = reason
            else:
                place = next(
                    (i for i, (a, b) in enumerate(zip(expected, served, strict=False)) if a != b),
                    min(len(expected), len(served)),
                )
                raise PipelineError(
                    f"conversation {case.name!r}: the same prompt, but other token ids from position {place}: "
                    f"trained {expected[place : place + 8]}, served {served[place : place + 8]}"
                )
    return PromptProof(report, equal, other)

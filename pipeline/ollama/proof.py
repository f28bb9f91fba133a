"""The proof that a model on a server is sent what was trained: every conversation of the suite, as text and as ids."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.llamacpp.tokenizer_differences import known_habit
from pipeline.ollama.client import Client
from pipeline.ollama.rendering import explain
from pipeline.prompt.cases import Case
from pipeline.prompt.conformance import COMPARED, EXACT, Report, for_ollama, judge, with_system
from pipeline.prompt.template import ChatTemplate, token_ids


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


def prove_prompts(
    client: Client,
    name: str,
    template: ChatTemplate,
    tokenizer: Any,
    gguf: Path,
    suite: Sequence[Case],
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
    with LlamaServer(gguf, context=256, jinja=False) as server:
        for case, outcome in zip(suite, report.outcomes, strict=True):
            if outcome.status not in COMPARED:
                continue
            trained = template.render(with_system(case.messages, system), case.tools, case.think)
            prompt = template.served(trained)
            if outcome.status != EXACT:
                # Of a text that is not quite the trained one, the ids still have to be what the trainer made of it.
                trained, prompt = trained.removesuffix(prompt) + outcome.served, outcome.served
            expected = token_ids(tokenizer, trained)
            served = server.tokenize(prompt, add_special=True, parse_special=True)
            if expected == served:
                equal += 1
            elif reason := known_habit(server, tokenizer, trained, served):
                other[case.name] = reason
            else:
                place = len(os.path.commonprefix([expected, served]))
                raise PipelineError(
                    f"conversation {case.name!r}: the same prompt, but other token ids from position {place}: "
                    f"trained {expected[place : place + 8]}, served {served[place : place + 8]}"
                )
    return PromptProof(report, equal, other)

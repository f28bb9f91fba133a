"""ollama: a model that stands in an Ollama is sent the prompt that its folder makes, and ends its answers.

Who created it, and with what, is not known: what counts is what the server says and does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.ollama.address import usual_host
from pipeline.ollama.client import Client
from pipeline.ollama.deployment import askable, shown_parameters
from pipeline.ollama.parameters import stop_strings
from pipeline.ollama.rendering import explain
from pipeline.prompt.cases import conversations
from pipeline.prompt.conformance import for_ollama, judge
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result

_PROMPT = Claim("ollama.prompt", "deploy", "the model in Ollama is sent the prompt that the folder's template makes")
_STOPS = Claim("ollama.stop", "deploy", "every text that ends a turn is a stop string")
_ENDS = Claim("ollama.stopping", "deploy", "answers end by themselves in Ollama")


def file_of(name: str) -> Path:
    """The GGUF file of a model in the Ollama of this machine.

    Raises:
        UserError: no Ollama answers, it has no such model, or keeps it on another machine.
    """
    with Client(usual_host()) as client:
        if client.digest(name) is None:
            raise UserError(f"--ollama {name}: there is no such model at {client.host}; `ollama list` shows them")
        found = re.search(r"^FROM (.+)$", str(client.show(name).get("modelfile") or ""), re.MULTILINE)
        path = Path(found[1].strip()) if found else Path()
        if not path.is_file():
            raise UserError(
                f"--ollama {name}: its file cannot be read on this machine ({path}); give the GGUF file with --gguf"
            )
        return path


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge the model, if one is named."""
    name = artefacts.ollama
    if name is None:
        return
    with Client(usual_host()) as client:
        shown = client.show(name)
        yield _prompts(artefacts, client, name, shown)
        stops = shown_parameters(str(shown.get("parameters") or "")).get("stop") or []
        missing = sorted(set(stop_strings(artefacts.template)) - set(stops))
        words = f"the stop strings lack {', '.join(map(repr, missing))}"
        yield _STOPS.holds(not missing, words, len(missing), "at most 0")
        questions = askable(artefacts.questions, shown.get("capabilities", ()))
        options = {"temperature": 0, "num_predict": artefacts.longest_answer}
        ended = 0
        for question in questions:
            answer = client.chat(name, for_ollama(question.messages), tools=question.tools or (), options=options)
            ended += answer.get("done_reason") == "stop"
        words = f"{ended} of {len(questions)} answers ended before the limit"
        yield _ENDS.at_least(ended / len(questions), artefacts.settings.stopping, words)


def _prompts(artefacts: Artefacts, client: Client, name: str, shown: dict[str, Any]) -> Result:
    _, path = next(artefacts.files)
    jinja = inspect(path).metadata.get("tokenizer.chat_template")
    template = artefacts.template
    try:
        report = judge(
            template,
            conversations(template.special_tokens),
            lambda case: client.render(name, for_ollama(case.messages), case.tools, case.think),
            joins=shown.get("template") not in (jinja, "{{ .Prompt }}"),  # a Go template is given neighbours as one
            default_system=shown.get("system") or "",
        )
    except PipelineError as error:
        return _PROMPT.holds(False, str(error))
    difference = report.first_difference()
    words = explain(difference) if difference else "no conversation could be compared"
    return _PROMPT.holds(report.exact, words, report.summary, "no difference")

"""What this program has made in Ollama: the plan that it was made from, what the server says of it, and where it is.

`create.json` of the stage modelfile is the plan. Whoever wants to know whether a model on a server is the one that was
meant asks `differences`, which compares the whole plan with the server's own words.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.data.questions import Question
from pipeline.errors import PipelineError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.ollama.client import Client
from pipeline.ollama.modelfile_text import ServedModel
from pipeline.ollama.ollama_server import OllamaServer
from pipeline.resources import sha256_of
from pipeline.run.layout import Layout


def planned(folder: Path) -> tuple[ServedModel, Path, Path | None]:
    """What the `create.json` in a folder says, the GGUF file that it names, and the adapter's, if it names one."""
    record = json.loads((folder / "create.json").read_text(encoding="utf-8"))
    body = record["request"]
    served = ServedModel(
        gguf=record["gguf"],
        adapter=record["adapter"],
        template=body.get("template", ""),
        system=body.get("system", ""),
        parameters=body.get("parameters", {}),
        messages=tuple(body.get("messages", ())),
        licenses=tuple(body.get("license", ())),
        requires=body.get("requires", ""),
    )
    adapter = (folder / served.adapter).resolve() if served.adapter else None
    return served, (folder / served.gguf).resolve(), adapter


def template_in_force(served: ServedModel, gguf: Path) -> str:
    """What the server has to show as the template: the Go TEMPLATE, or for the native way the Jinja of the GGUF."""
    return served.template or str(inspect(gguf).metadata["tokenizer.chat_template"])


def differences(shown: Mapping[str, Any], meant: ServedModel, template: str, adapter: Path | None = None) -> list[str]:
    """What a server says of a model (`/api/show`) and is not what it was told, in words; none if all is as meant.

    Args:
        shown: the server's answer.
        meant: what it was told.
        template: of `template_in_force`.
        adapter: the file that it was given as its adapter; None where it was given none.
    """
    wrong = []
    # Ollama keeps an adapter's file as it is, and names it by its digest; the model's own file it writes anew.
    lines = re.findall(r"^ADAPTER (.+)$", str(shown.get("modelfile") or ""), re.MULTILINE)
    has = [Path(line.strip().strip('"').replace("\\", "/")).name.removeprefix("sha256-") for line in lines]
    if has != ([sha256_of(adapter)] if adapter else []):
        wrong.append(f"its adapters are {', '.join(has) or 'none'}" + (f" instead of {adapter}" if adapter else ""))
    if shown.get("template") != template:
        wrong.append(f"the template in force is {str(shown.get('template'))[:300]!r}")
    if meant.requires and shown.get("requires") != meant.requires:
        wrong.append(f"REQUIRES is {shown.get('requires')!r} instead of {meant.requires!r}")
    for what, is_now, was_told in (
        ("system text", shown.get("system") or "", meant.system),
        ("licence", shown.get("license") or "", "\n".join(meant.licenses)),
        ("messages", shown.get("messages") or [], [dict(message) for message in meant.messages]),
    ):
        if is_now != was_told:
            wrong.append(f"the {what}: {is_now!r} instead of {was_told!r}")
    told = shown_parameters(str(shown.get("parameters") or ""))
    for key, value in meant.parameters.items():
        if told.get(key) != (value if isinstance(value, list) else [value]):
            wrong.append(f"parameter {key} is {told.get(key)!r} instead of {value!r}")
    if unasked := sorted(told.keys() - meant.parameters.keys()):
        wrong.append(f"it has parameters that nobody asked for: {', '.join(unasked)}")
    if "completion" not in shown.get("capabilities", []):
        wrong.append(f"its capabilities are {shown.get('capabilities')}")
    return wrong


def read_back(
    client: Client, name: str, meant: ServedModel, template: str, adapter: Path | None = None
) -> dict[str, Any]:
    """Ask the server for a model, and compare it with what was meant.

    Args:
        client: the server.
        name: the model.
        meant: what the server was told.
        template: of `template_in_force`.
        adapter: its adapter's file, if it has one.

    Returns:
        The server's own words: capabilities, parameters, requires, details.

    Raises:
        PipelineError: something is not as it was meant, with both.
    """
    shown = client.show(name)
    if wrong := differences(shown, meant, template, adapter):
        raise PipelineError(f"Ollama did not make of {name} what it was told: " + "; ".join(wrong))
    return {
        "capabilities": shown["capabilities"],
        "parameters": shown_parameters(str(shown.get("parameters") or "")),
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


def askable(questions: Sequence[Question], capabilities: Sequence[str]) -> list[Question]:
    """The questions that Ollama lets this model be asked: with tools only where it finds that the model takes them."""
    return [question for question in questions if not question.tools or "tools" in capabilities]


@contextmanager
def deployed(run: Path, log: Path | None = None) -> Iterator[tuple[Client, str] | None]:
    """Open the server that has the run's first model.

    Args:
        run: the run's folder, in which `deploy` has run.
        log: where the log of a server of our own is kept.

    Yields:
        The client and the model's name, or None if the run was not deployed.

    Raises:
        PipelineError: the model that was deployed is not there any more, or is another one.
    """
    record = json.loads(Layout(run).deployment.read_text(encoding="utf-8"))
    if not record["deployed"]:
        yield None
        return
    model = record["models"][0]
    if record["own_server"]:
        with OllamaServer(run / record["models_folder"], log=log) as server, Client(server.host) as client:
            _check(client, model["name"], model["digest"])
            yield client, model["name"]
    else:
        with Client(record["host"]) as client:
            _check(client, model["name"], model["digest"])
            yield client, model["name"]


def deployed_plan(run: Path) -> tuple[ServedModel, Path, Path | None]:
    """`planned` of the run's first model, the one that `deployed` opens."""
    layout = Layout(run)
    record = json.loads(layout.deployment.read_text(encoding="utf-8"))
    return planned(layout.create_request(record["models"][0]["variant"]).parent)


def _check(client: Client, name: str, digest: str) -> None:
    if client.digest(name) != digest:
        raise PipelineError(
            f"{name} in Ollama is not, or no longer, the model that this run deployed; `pipeline deploy --force` "
            "deploys it again"
        )


def proof_name(run: Path) -> str:
    """A name in Ollama that is this run's alone, and the same after a crash."""
    return f"pipeline-proof-{hashlib.sha256(f'{platform.node()}:{run.resolve()}'.encode()).hexdigest()[:12]}"


def template_selected(log: Path | None, name: str, way: str) -> str | None:
    """The template source that our own server says it selected.

    A user's server has a log of its own, and a newer Ollama may have other words: there the prompts that it rendered
    are the proof.

    Raises:
        PipelineError: it is not the way that was chosen.
    """
    text = log.read_text(encoding="utf-8", errors="replace") if log is not None else ""
    found = re.findall(rf'msg="template selection" model=\S*{re.escape(name)} selected=(\S+)', text)
    if not found:
        return None
    meant = {"go": "go_template", "native": "gguf_chat_template"}[way]
    if set(found) != {meant}:
        raise PipelineError(
            f"Ollama rendered prompts of {name} by {', '.join(sorted(set(found) - {meant}))} instead of {meant}, which "
            "was chosen and proven; see its log, and choose the other way with ollama.template"
        )
    return str(found[-1])


def remove(client: Client, name: str) -> None:
    """Remove a model with all its tags. That it fails is only told: it must not hide why a deployment ended."""
    try:
        for there in client.names():
            if there.startswith(f"{name}:"):
                client.unload(there)
                client.delete(there)
    except PipelineError as error:
        console.warn(f"{name} could not be removed from Ollama: {error}")

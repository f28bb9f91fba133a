"""deploy: `ollama create`, read back, proven, asked something - and only then under its name.

Every model is first made under a name for its proof, so that those that are already there stay until all the new ones
are proven; that name is removed again, after a `kill -9` by the next attempt. Where there is no Ollama, that is said,
with what to type; it is no failure.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import console
from pipeline.data.sources import read_rows
from pipeline.errors import PipelineError, UserError
from pipeline.ollama.target import local_store, names_of, refuse_taken, remember, server, usual_host
from pipeline.run.layout import Layout
from pipeline.run.stage import Stage, Task

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.ollama.client import Client
    from pipeline.ollama.modelfile import ServedModel

QUESTIONS = 5


def main(task: Task) -> dict[str, Any]:
    """Deploy every GGUF file of the run; write deploy.json."""
    config = task.config.ollama
    names = names_of(config.name, task.config.export.quant)
    with server(config.host, task.layout.ollama_models, task.output / "ollama.log") as found:
        if isinstance(found, str):
            return _not_deployed(task, found)
        client, own, log = found

        def refuse() -> None:
            for name in names.values() if not own else ():
                refuse_taken(client, name, task.layout, replace=config.replace)

        refuse()
        store = task.layout.ollama_models if own else local_store(client)
        proof = _proof_name(task.run)
        _remove(client, proof)  # what a deployment left that was killed
        try:
            models = [
                _prove(task, client, log, store, variant, f"{proof}:{variant}", name) for variant, name in names.items()
            ]
            refuse()  # proving takes minutes: another may have made one since
            remember(task.layout, {model["name"]: model["digest"] for model in models})
            for model in models:
                _publish(client, f"{proof}:{model['variant']}", model["name"], model["digest"])
        finally:
            _remove(client, proof)
        record = {
            "deployed": True,
            "host": None if own else client.host,
            "own_server": own,
            "models_folder": task.layout.ollama_models.name if own else None,
            "version": client.version,
            "models": models,
        }
    _write(task, record)
    return {
        "deployed": True,
        "own_server": own,
        "ollama": record["version"],
        "names": [model["name"] for model in models],
        "prompts": models[0]["prompts"]["summary"],
        "questions": len(models[0]["answers"]),
        "right": sum(bool(answer["right"]) for answer in models[0]["answers"]),
        "stopped": sum(answer["stopped"] for answer in models[0]["answers"]),
        "first_answer_seconds": models[0]["first_answer_seconds"],
    }


def unfinished(figures: dict[str, Any]) -> str | None:
    """Without an Ollama nothing was deployed: by the next time there may be one."""
    return None if figures["deployed"] else "there was no Ollama"


def plan(config: Config, run: Path) -> list[str]:
    """What a deployment would do, one line each; nothing is created (`--dry-run`)."""
    from pipeline.ollama.client import Client, canonical
    from pipeline.ollama.server import find_ollama

    lines, layout = [], Layout(run)
    host = config.ollama.host or usual_host()
    try:
        with Client(host) as client:
            there = {canonical(name) for name in client.names()}
            lines.append(f"server: Ollama {client.version} at {client.host}")
    except UserError as error:
        if config.ollama.host:
            raise
        there = set()
        program = find_ollama()
        lines.append(
            f"server: one of our own ({program}), models in {layout.ollama_models}" if program else f"none: {error}"
        )
    for kind, name in names_of(config.ollama.name, config.export.quant).items():
        request = layout.create_request(kind)
        if not request.is_file():
            raise UserError(f"{request}: not there yet; run `pipeline modelfile` first")
        served, gguf = _plan(request)
        way = "TEMPLATE" if served.template else "the GGUF's own Jinja"
        taken = ", which is there already" if canonical(name) in there else ""
        lines.append(f"create: {name}{taken}, from {gguf} ({gguf.stat().st_size:,} bytes), rendered by {way}")
        lines += [f"  {key} = {json.dumps(value, ensure_ascii=False)}" for key, value in served.parameters.items()]
        if served.system:
            lines.append(f"  system = {json.dumps(served.system, ensure_ascii=False)}")
    return lines


def _plan(request: Path) -> tuple[ServedModel, Path]:
    """What `create.json` says, and the GGUF file that it names."""
    from pipeline.ollama.modelfile import ServedModel

    record = json.loads(request.read_text(encoding="utf-8"))
    if record["adapter"]:
        raise UserError(f"{request}: names an adapter; deploy sends whole models: merge it first")
    body = record["request"]
    served = ServedModel(
        gguf=record["gguf"],
        template=body.get("template", ""),
        system=body.get("system", ""),
        parameters=body.get("parameters", {}),
        messages=tuple(body.get("messages", ())),
        licenses=tuple(body.get("license", ())),
        requires=body.get("requires", ""),
    )
    return served, (request.parent / served.gguf).resolve()


def _not_deployed(task: Task, reason: str) -> dict[str, Any]:
    commands = []
    for kind, name in names_of(task.config.ollama.name, task.config.export.quant).items():
        modelfile = task.layout.modelfile(kind)
        if modelfile.is_file():
            commands += [
                f"cd {shlex.quote(str(modelfile.parent))} && ollama create {name} -f Modelfile",
                f"ollama run {name}",
            ]
        else:
            commands.append(f"pipeline deploy  # no Modelfile can carry {name}")
    _write(task, {"deployed": False, "reason": reason, "commands": commands})
    task.warn(f"not deployed: {reason}. Where there is one, type:\n  " + "\n  ".join(commands))
    return {"deployed": False, "reason": reason, "commands": commands}


def _proof_name(run: Path) -> str:
    """A name in Ollama that is this run's alone, and the same after a crash."""
    return f"pipeline-proof-{hashlib.sha256(f'{platform.node()}:{run.resolve()}'.encode()).hexdigest()[:12]}"


def _prove(
    task: Task, client: Client, log: Path | None, store: Path | None, variant: str, proof_name: str, name: str
) -> dict[str, Any]:
    """Make a model under its proof's name, and prove it; `name` is what it will be called."""
    from pipeline.llamacpp.gguf_file import inspect
    from pipeline.ollama.proof import prove_prompts, read_back
    from pipeline.prompt.cases import conversations
    from pipeline.prompt.template import ChatTemplate
    from pipeline.prompt.tokenizer import saved_tokenizer

    served, gguf = _plan(task.layout.create_request(variant))
    started = time.monotonic()
    model = task.layout.merged_model
    tokenizer = saved_tokenizer(model)
    template = ChatTemplate.from_tokenizer(tokenizer, str(model))
    _create(client, proof_name, served, gguf, store)
    in_force = served.template or str(inspect(gguf).metadata["tokenizer.chat_template"])
    shown = read_back(client, proof_name, served, in_force)
    _read_back_texts(client, proof_name, served)
    proof = prove_prompts(
        client,
        proof_name,
        template,
        tokenizer,
        gguf,
        conversations(template.special_tokens),
        joins=bool(served.template),
        system=served.system,
    )
    console.say(f"  {name}: prompts {proof.report.summary}; {proof.token_equal} with equal token ids")
    for reason in dict.fromkeys(proof.other_ids.values()):
        cases = [case for case, why in proof.other_ids.items() if why == reason]
        task.warn(f"other token ids are served for texts of some kinds: {reason} ({', '.join(cases)})")
    answers, first_answer = _ask(task, client, proof_name)
    way = "go" if served.template else "native"
    selected = _selected(log, proof_name, way)
    client.unload(proof_name)  # the next one needs the memory
    return {
        "name": name,
        "variant": variant,
        "digest": client.digest(proof_name),
        "way": way,
        "selected": selected,
        "shown": shown,
        "prompts": {
            "summary": proof.report.summary,
            "token_ids_equal": proof.token_equal,
            "other_token_ids": dict(proof.other_ids),
            "outcomes": {outcome.name: outcome.status for outcome in proof.report.outcomes},
        },
        "answers": answers,
        "first_answer_seconds": first_answer,
        "seconds": round(time.monotonic() - started, 1),
    }


def _create(client: Client, name: str, served: ServedModel, gguf: Path, store: Path | None) -> None:
    size = gguf.stat().st_size
    with console.progress("giving the model to Ollama", size / 1e6, "MB") as update:
        digest = client.upload(gguf, lambda sent: update(sent / 1e6), store)
    with console.progress("ollama create", 100, "%") as update:
        client.create(name, {**served.body(), "files": {gguf.name: digest}}, lambda _, share: update(100 * share))
        update(100)


def _read_back_texts(client: Client, name: str, served: ServedModel) -> None:
    """The licence and the messages, which have no part in how it answers the proof's questions."""
    shown = client.show(name)
    told = (shown.get("license") or "", shown.get("messages") or [])
    meant = ("\n".join(served.licenses), list(served.messages))
    for what, is_now, was_told in zip(("licence", "messages"), told, meant, strict=True):
        if is_now != was_told:
            raise PipelineError(f"Ollama did not make of {name} what it was told: {what} {is_now!r}, not {was_told!r}")


def _publish(client: Client, proof_name: str, name: str, digest: str) -> None:
    client.copy(proof_name, name)
    if (found := client.digest(name)) != digest:
        raise PipelineError(
            f"{name} at {client.host} is not the model that was proven: its digest is {found}, not {digest}; did "
            "another program write it at the same time? Run the same command again"
        )


def _ask(task: Task, client: Client, name: str) -> tuple[list[dict[str, Any]], float | None]:
    """Ask questions of the test rows.

    Returns:
        The answers beside the expected ones, and the seconds from the first request to its answer.
    """
    from pipeline.data.metric import score
    from pipeline.prompt.conformance import for_ollama

    rows = _rows(task.layout)
    metric, limit = task.config.eval.metric, task.config.eval.max_new_tokens
    if not rows:
        task.warn("nothing was asked: no row of the data ends with a question and its answer")
    answers = []
    first: float | None = None
    for row in rows[:QUESTIONS]:
        *question, expected = row["messages"]
        started = time.monotonic()
        options = {"temperature": 0, "num_predict": limit}
        answer = client.chat(name, for_ollama(question), tools=row.get("tools", ()), options=options)
        first = first if first is not None else round(time.monotonic() - started, 3)
        right = score(metric, answer["content"], expected["content"]) if metric != "none" else None
        answers.append(
            {
                "question": question[-1]["content"],
                "expected": expected["content"],
                "answer": answer["content"],
                "right": right,
                "stopped": answer.get("done_reason") == "stop",
                "prompt_tokens": answer.get("prompt_eval_count"),
                "tokens": answer.get("eval_count"),
            }
        )
        console.say(f"  asked: {_short(question[-1]['content'])}\n  said:  {_short(answer['content'])}")
    stopped, least = sum(answer["stopped"] for answer in answers), task.config.verify.stopping
    if stopped < least * len(answers):
        raise PipelineError(
            f"the model does not stop by itself: {stopped} of {len(answers)} answers ended within {limit} tokens, and "
            f"{least:.0%} must (verify.stopping); see whether its end-of-turn token was trained, or raise "
            "eval.max_new_tokens if it has that much to say"
        )
    return answers, first


def _rows(layout: Layout) -> list[dict[str, Any]]:
    """Rows with a question and an answer: of the test data, else of what else there is."""
    for name in ("test", "validation", "train"):
        path = layout.rows(name)
        if path.is_file():
            rows = list(itertools.islice(read_rows(path), 4 * QUESTIONS))
            rows = [row for row in rows if [m["role"] for m in row["messages"][-2:]] == ["user", "assistant"]]
            if rows:
                return rows
    return []


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:117]}..."


def _selected(log: Path | None, name: str, way: str) -> str | None:
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


def _remove(client: Client, proof: str) -> None:
    """Remove the proof's models. That it fails is only told: it must not hide why the deployment ended."""
    try:
        for name in client.names():
            if name.startswith(f"{proof}:"):
                client.unload(name)
                client.delete(name)
    except PipelineError as error:
        console.warn(f"{proof} could not be removed from Ollama: {error}")


def _write(task: Task, record: dict[str, Any]) -> None:
    text = json.dumps(record, ensure_ascii=False, indent=2)
    task.new(task.layout.deployment).write_text(text + "\n", encoding="utf-8")


STAGE = Stage(
    name="deploy",
    summary="Create the model in Ollama, prove it, and ask it test questions.",
    run=main,
    needs=("data", "merge", "quantize", "modelfile"),
    reads={"data": ("test.jsonl", "validation.jsonl", "train.jsonl")},
    settings=(
        *("ollama.name", "ollama.host", "export.quant"),
        *("eval.metric", "eval.max_new_tokens", "verify.stopping"),
    ),
    indifferent_to=("ollama.replace",),  # a permission
    libraries=("transformers", "tokenizers", "jinja2"),
    programs=("ollama",),
    figures=("names", "ollama", "prompts", "reason"),
    rung=True,
    unfinished=unfinished,
)

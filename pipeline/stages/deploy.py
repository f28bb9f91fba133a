"""deploy: `ollama create`, read back, proven, asked something - and only then under its name.

A model is first made under a name of its own, so that one that is already there stays until the new one is proven; it
is removed again whatever happens. Where there is no Ollama, that is said, with what to type; it is no failure.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import console
from pipeline.errors import PipelineError, UserError
from pipeline.ollama.target import STORE, names_of, refuse_taken, server
from pipeline.work import Work

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.ollama.client import Client
    from pipeline.ollama.modelfile import ServedModel

NEEDS = ("data", "merge", "quantize", "modelfile")
CONFIG = (
    "ollama.name",
    "ollama.host",
    "ollama.replace",
    "export.quant",
    "eval.metric",
    "eval.max_new_tokens",
)

QUESTIONS = 5


def main(work: Work) -> dict[str, Any]:
    """Deploy every GGUF file of the run; write deploy.json."""
    with server(work.config.ollama.host, work.run / STORE, work.output / "ollama.log") as found:
        if isinstance(found, str):
            return _not_deployed(work, found)
        client, own, log = found
        models = []
        for variant, name in names_of(work.config.ollama.name, work.config.export.quant).items():
            models.append(_deploy(work, client, own, log, variant, name))
        record = {
            "deployed": True,
            "host": None if own else client.host,
            "own_server": own,
            "models_folder": STORE if own else None,
            "version": client.version,
            "models": models,
        }
    _write(work, record)
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


def plan(config: Config, run: Path) -> list[str]:
    """What a deployment would do, one line each; nothing is created (`--dry-run`)."""
    from pipeline.ollama.client import Client, normal_host
    from pipeline.ollama.server import DEFAULT_HOST, find_ollama

    lines = []
    try:
        with Client(normal_host(config.ollama.host or os.environ.get("OLLAMA_HOST") or DEFAULT_HOST)) as client:
            there = client.names()
            lines.append(f"server: Ollama {client.version} at {client.host}")
    except UserError as error:
        if config.ollama.host:
            raise
        there = {}
        program = find_ollama()
        lines.append(f"server: one of our own ({program}), models in {run / STORE}" if program else f"none: {error}")
    for kind, name in names_of(config.ollama.name, config.export.quant).items():
        folder = run / "modelfile" / kind
        if not (folder / "create.json").is_file():
            raise UserError(f"{folder}: has no create.json; run the stage modelfile first")
        served, gguf = _plan(folder)
        way = "TEMPLATE" if served.template else "the GGUF's own Jinja"
        taken = ", which is there already" if name in there else ""
        lines.append(f"create: {name}{taken}, from {gguf} ({gguf.stat().st_size:,} bytes), rendered by {way}")
        lines += [f"  {key} = {json.dumps(value, ensure_ascii=False)}" for key, value in served.parameters.items()]
        if served.system:
            lines.append(f"  system = {json.dumps(served.system, ensure_ascii=False)}")
    return lines


def _plan(folder: Path) -> tuple[ServedModel, Path]:
    """What `create.json` says, and the GGUF file that it names."""
    from pipeline.ollama.modelfile import ServedModel

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
    return served, (folder / served.gguf).resolve()


def _not_deployed(work: Work, reason: str) -> dict[str, Any]:
    commands = []
    for kind, name in names_of(work.config.ollama.name, work.config.export.quant).items():
        folder = work.folder("modelfile", kind)
        commands.append(f"cd {folder} && ollama create {name} -f Modelfile")
        commands.append(f"ollama run {name}")
    _write(work, {"deployed": False, "reason": reason, "commands": commands})
    work.warn(f"not deployed: {reason}. Where there is one, type:\n  " + "\n  ".join(commands))
    return {"deployed": False, "reason": reason, "commands": commands}


def _deploy(work: Work, client: Client, own: bool, log: Path | None, variant: str, name: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from pipeline.chat.conformance import conversations
    from pipeline.llamacpp.gguf_file import inspect
    from pipeline.llamacpp.programs import require_space
    from pipeline.ollama.jinja import ChatTemplate
    from pipeline.ollama.proof import prove_prompts, read_back

    served, gguf = _plan(work.folder("modelfile", variant))
    if not own:
        refuse_taken(client, name, work.folder("deploy"), replace=work.config.ollama.replace)
    started = time.monotonic()
    model = str(work.folder("merge") / "model")
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    template = ChatTemplate.from_tokenizer(tokenizer, model)
    if own:
        require_space(work.run, 2 * gguf.stat().st_size, "Ollama's copy of the model, twice while it checks it")
    proof_name = f"pipeline-proof-{os.getpid()}:{variant}"
    try:
        _create(client, proof_name, served, gguf)
        in_force = served.template or str(inspect(gguf).metadata["tokenizer.chat_template"])
        shown = read_back(client, proof_name, served, in_force)
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
            work.warn(f"other token ids are served for texts of some kinds: {reason} ({', '.join(cases)})")
        answers, first_answer = _ask(work, client, proof_name)
        client.copy(proof_name, name)
    finally:
        _remove(client, proof_name)
    digest = client.names().get(name)
    if digest is None:
        raise PipelineError(f"{name} is not among the models of Ollama at {client.host}, though it was created there")
    selected = _selected(log)
    return {
        "name": name,
        "variant": variant,
        "digest": digest,
        "way": "go" if served.template else "native",
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


def _create(client: Client, name: str, served: ServedModel, gguf: Path) -> None:
    size = gguf.stat().st_size
    with console.progress("giving the model to Ollama", size / 1e6, "MB") as update:
        digest = client.upload(gguf, lambda sent: update(sent / 1e6))
    with console.progress("ollama create", 100, "%") as update:
        client.create(name, {**served.body(), "files": {gguf.name: digest}}, lambda _, share: update(100 * share))
        update(100)


def _ask(work: Work, client: Client, name: str) -> tuple[list[dict[str, Any]], float | None]:
    """Ask questions of the test rows.

    Returns:
        The answers beside the expected ones, and the seconds from the first request to its answer.
    """
    from pipeline.chat.metric import score

    rows = _rows(work.folder("data"))
    metric, limit = work.config.eval.metric, work.config.eval.max_new_tokens
    answers = []
    first: float | None = None
    for row in rows[:QUESTIONS]:
        *question, expected = row["messages"]
        started = time.monotonic()
        answer = client.chat(name, question, tools=row.get("tools", ()), options={"num_predict": limit})
        first = first if first is not None else round(time.monotonic() - started, 3)
        right = score(metric, answer["content"], expected["content"]) if metric != "none" else None
        answers.append(
            {
                "question": question[-1]["content"],
                "expected": expected["content"],
                "answer": answer["content"],
                "right": right,
                "stopped": answer.get("done_reason") == "stop",
                "tokens": answer.get("eval_count"),
            }
        )
        console.say(f"  asked: {_short(question[-1]['content'])}\n  said:  {_short(answer['content'])}")
    if answers and not any(answer["stopped"] for answer in answers):
        raise PipelineError(
            f"the model never stops by itself: {len(answers)} answers of {limit} tokens each; see whether its "
            "end-of-turn token was trained (`pipeline verify`)"
        )
    return answers, first


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Rows with a question and an answer: of the test data, else of what else there is."""
    for name in ("test", "validation", "train"):
        path = folder / f"{name}.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines[: 4 * QUESTIONS]]
            rows = [row for row in rows if [m["role"] for m in row["messages"][-2:]] == ["user", "assistant"]]
            if rows:
                return rows
    return []


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:117]}..."


def _selected(log: Path | None) -> str | None:
    """The template source that our own server says it selected."""
    if log is None:
        return None
    found = re.findall(r'msg="template selection".*? selected=(\S+)', log.read_text(encoding="utf-8", errors="replace"))
    return found[-1] if found else None


def _remove(client: Client, name: str) -> None:
    try:
        if name in client.names():
            client.unload(name)
            client.delete(name)
    except PipelineError as error:
        console.warn(f"{name} could not be removed from Ollama: {error}")


def _write(work: Work, record: dict[str, Any]) -> None:
    text = json.dumps(record, ensure_ascii=False, indent=2)
    (work.output / "deploy.json").write_text(text + "\n", encoding="utf-8")

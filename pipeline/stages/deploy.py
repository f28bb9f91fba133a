"""deploy: `ollama create`, read back, proven, asked something - and only then under its name.

Every model is first made under a name for its proof, so that those that are already there stay until all the new ones
are proven; that name is removed again, after a `kill -9` by the next attempt. Where there is no Ollama, that is said,
with what to type; it is no failure.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import console
from pipeline.data.questions import asked
from pipeline.errors import PipelineError, UserError
from pipeline.ollama.deployment import proof_name, remove
from pipeline.ollama.target import find, local_store, names_of, refuse_taken, remember, server
from pipeline.run.layout import Layout
from pipeline.run.stage import Stage, Task

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.ollama.client import Client
    from pipeline.ollama.modelfile_text import ServedModel

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
        proof = proof_name(task.run)
        remove(client, proof)  # what a deployment left that was killed
        try:
            models = [
                _prove(task, client, log, store, variant, f"{proof}:{variant}", name) for variant, name in names.items()
            ]
            refuse()  # proving takes minutes: another may have made one since
            remember(task.layout, {model["name"]: model["digest"] for model in models})
            for model in models:
                _publish(client, f"{proof}:{model['variant']}", model["name"], model["digest"])
        finally:
            remove(client, proof)
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


def preview(config: Config, run: Path) -> list[str]:
    """What a deployment would do, one line each; nothing is created (`--dry-run`)."""
    from pipeline.ollama.deployment import planned
    from pipeline.ollama.model_names import canonical

    lines, layout = [], Layout(run)
    found, there = find(config.ollama.host), set()
    if found.running is not None:
        with found.running as client:
            there = {canonical(name) for name in client.names()}
            lines.append(f"server: Ollama {client.version} at {client.host}")
    elif found.program is not None:
        lines.append(f"server: one of our own ({found.program}), models in {layout.ollama_models}")
    else:
        lines.append(f"none: {found.why}")
    for kind, name in names_of(config.ollama.name, config.export.quant).items():
        request = layout.create_request(kind)
        if not request.is_file():
            raise UserError(f"{request}: not there yet; run `pipeline modelfile` first")
        served, gguf, adapter = planned(request.parent)
        way = "TEMPLATE" if served.template else "the GGUF's own Jinja"
        taken = ", which is there already" if canonical(name) in there else ""
        sizes = f"{gguf} ({gguf.stat().st_size:,} bytes)"
        if adapter:
            sizes += f", which models on this base share, and {adapter} ({adapter.stat().st_size:,} bytes)"
        lines.append(f"create: {name}{taken}, from {sizes}, rendered by {way}")
        lines += [f"  {key} = {json.dumps(value, ensure_ascii=False)}" for key, value in served.parameters.items()]
        if served.system:
            lines.append(f"  system = {json.dumps(served.system, ensure_ascii=False)}")
    return lines


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


def _prove(
    task: Task, client: Client, log: Path | None, store: Path | None, variant: str, proof: str, name: str
) -> dict[str, Any]:
    """Make a model under the name `proof`, and prove it; `name` is what it will be called."""
    from pipeline.ollama.deployment import planned, read_back, template_in_force, template_selected
    from pipeline.ollama.proof import prove_prompts
    from pipeline.prompt.cases import conversations
    from pipeline.prompt.template import ChatTemplate
    from pipeline.prompt.tokenizer import saved_tokenizer

    served, gguf, adapter = planned(task.layout.create_request(variant).parent)
    started = time.monotonic()
    model = task.layout.merged_model
    tokenizer = saved_tokenizer(model)
    template = ChatTemplate.from_tokenizer(tokenizer, str(model))
    _create(client, proof, served, gguf, adapter, store)
    shown = read_back(client, proof, served, template_in_force(served, gguf), adapter)
    prompts = prove_prompts(
        client,
        proof,
        template,
        tokenizer,
        gguf,
        conversations(template.special_tokens),
        joins=bool(served.template),
        system=served.system,
    )
    console.say(f"  {name}: prompts {prompts.report.summary}; {prompts.token_equal} with equal token ids")
    for reason in dict.fromkeys(prompts.other_ids.values()):
        cases = [case for case, why in prompts.other_ids.items() if why == reason]
        task.warn(f"other token ids are served for texts of some kinds: {reason} ({', '.join(cases)})")
    answers, first_answer = ask(task, client, proof, shown["capabilities"])
    way = "go" if served.template else "native"
    selected = template_selected(log, proof, way)
    client.unload(proof)  # the next one needs the memory
    return {
        "name": name,
        "variant": variant,
        "digest": client.digest(proof),
        "bytes": gguf.stat().st_size,
        "adapter_bytes": adapter.stat().st_size if adapter else None,
        "way": way,
        "selected": selected,
        "shown": shown,
        "prompts": {
            "summary": prompts.report.summary,
            "token_ids_equal": prompts.token_equal,
            "other_token_ids": dict(prompts.other_ids),
            "outcomes": {outcome.name: outcome.status for outcome in prompts.report.outcomes},
        },
        "answers": answers,
        "first_answer_seconds": first_answer,
        "seconds": round(time.monotonic() - started, 1),
    }


def _create(
    client: Client, name: str, served: ServedModel, gguf: Path, adapter: Path | None, store: Path | None
) -> None:
    def give(path: Path, what: str) -> dict[str, str]:
        with console.progress(f"giving {what} to Ollama", path.stat().st_size / 1e6, "MB") as update:
            return {path.name: client.upload(path, lambda sent: update(sent / 1e6), store)}

    body = {**served.body(), "files": give(gguf, "the model")}
    if adapter:
        body["adapters"] = give(adapter, "the adapter")
    with console.progress("ollama create", 100, "%") as update:
        client.create(name, body, lambda _, share: update(100 * share))
        update(100)


def _publish(client: Client, proof_name: str, name: str, digest: str) -> None:
    client.copy(proof_name, name)
    if (found := client.digest(name)) != digest:
        raise PipelineError(
            f"{name} at {client.host} is not the model that was proven: its digest is {found}, not {digest}; did "
            "another program write it at the same time? Run the same command again"
        )


def ask(
    task: Task, client: Client, name: str, capabilities: Sequence[str]
) -> tuple[list[dict[str, Any]], float | None]:
    """Ask a model the first questions of the run.

    Args:
        task: the stage's task.
        client: the server.
        name: the model.
        capabilities: what Ollama finds that it can do.

    Returns:
        The answers beside the expected ones, and the seconds from the first request to its answer.

    Raises:
        PipelineError: too few answers end by themselves.
    """
    from pipeline.data.metric import score
    from pipeline.ollama.deployment import askable
    from pipeline.prompt.conformance import for_ollama

    settings = task.config.eval
    questions = asked(task.layout.data, min(QUESTIONS, settings.limit or QUESTIONS))
    can_be_asked = askable(questions, capabilities)
    if not can_be_asked:
        task.warn(
            "nothing was asked: the rows have tools, and Ollama lets a model with this template be given none"
            if questions
            else "nothing was asked: the run's rows are no questions (whole texts, or none)"
        )
    answers = []
    first: float | None = None
    options = {"temperature": 0, "num_predict": settings.max_new_tokens}
    for question in can_be_asked:
        started = time.monotonic()
        answer = client.chat(name, for_ollama(question.messages), tools=question.tools or (), options=options)
        first = first if first is not None else round(time.monotonic() - started, 3)
        judged = settings.metric != "none" and not question.tools  # calls of tools are not in the answer's text
        answers.append(
            {
                "question": question.messages[-1]["content"],
                "expected": question.expected,
                "answer": answer["content"],
                "right": score(settings.metric, answer["content"], question.expected) if judged else None,
                "stopped": answer.get("done_reason") == "stop",
                "prompt_tokens": answer.get("prompt_eval_count"),
                "tokens": answer.get("eval_count"),
            }
        )
        console.say(f"  asked: {_short(question.messages[-1]['content'])}\n  said:  {_short(answer['content'])}")
    stopped, least = sum(answer["stopped"] for answer in answers), task.config.verify.stopping
    if stopped < least * len(answers):
        raise PipelineError(
            f"the model does not stop by itself: {stopped} of {len(answers)} answers ended within "
            f"{settings.max_new_tokens} tokens, and {least:.0%} must (verify.stopping); see whether its end-of-turn "
            "token was trained, or raise eval.max_new_tokens if it has that much to say"
        )
    return answers, first


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:117]}..."


def _write(task: Task, record: dict[str, Any]) -> None:
    text = json.dumps(record, ensure_ascii=False, indent=2)
    task.new(task.layout.deployment).write_text(text + "\n", encoding="utf-8")


STAGE = Stage(
    name="deploy",
    summary="Create the model in Ollama, prove it, and ask it test questions.",
    run=main,
    needs=("data", "merge", "convert", "quantize", "modelfile"),
    reads={"data": ("test.jsonl", "test-sets.json", "validation.jsonl", "train.jsonl"), "convert": ("adapter.gguf",)},
    settings=(
        *("ollama.name", "ollama.host", "export.quant"),
        *("eval.metric", "eval.limit", "eval.max_new_tokens", "verify.stopping"),
    ),
    indifferent_to=("ollama.replace",),  # a permission
    libraries=("transformers", "tokenizers", "jinja2"),
    programs=("ollama",),
    figures=("names", "ollama", "prompts", "reason"),
    judged=True,
    unfinished=unfinished,
)

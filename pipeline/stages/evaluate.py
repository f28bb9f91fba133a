"""evaluate: the test questions asked at every rung, from the untouched base to Ollama, and the answers side by side.

Each rung is a variant of its own, so a new quantization type asks that file only. Answers are greedy everywhere. What
is shipped is asked through its server, question by question; the rungs before it are asked faster, with drafts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import Config, GivenAdapter
from pipeline.console import progress
from pipeline.data.metric import score
from pipeline.data.questions import Question, asked
from pipeline.data.sources import read_rows
from pipeline.model.adapter_folder import CONFIG, WEIGHTS, fit_to, read_given_adapter
from pipeline.model.base import base_folder
from pipeline.model.facts import base_files
from pipeline.model.merge_target import has_two_bases
from pipeline.model.nf4 import Record
from pipeline.model.trained_tokenizer import adapter_files, trained_tokenizer
from pipeline.run.stage import Stage, Task
from pipeline.verify.rungs import ADAPTER, ADAPTER_16BIT, BASE, GGUF_16BIT, MERGED, OLLAMA, alone, is_alone, rungs
from pipeline.verify.statistics import wilson_interval

TABLE = "table"
_TIMED = 8  # questions that tell how long one takes
_ON_THE_BASE = (BASE, ADAPTER, ADAPTER_16BIT)


def variants(config: Config) -> tuple[str, ...]:
    """The rungs in the order of the task, then the table that joins them; none without test data."""
    if not config.tests:
        return ()
    return (*rungs(config), TABLE)


def _alone(config: Config, variant: str) -> Path | None:
    """The folder of the adapter that is asked alone at a rung; None at the others."""
    return next((adapter.path for adapter in config.adapters if alone(adapter.called) == variant), None)


def needs(variant: str) -> tuple[str, ...]:
    """What a rung reads of other stages."""
    if is_alone(variant):
        return ("data",)
    stages = {
        BASE: (),
        ADAPTER: ("train",),
        ADAPTER_16BIT: ("train",),
        MERGED: ("merge",),
        GGUF_16BIT: ("merge", "convert"),
        OLLAMA: ("deploy",),
        TABLE: ("evaluate",),
    }
    return ("data", *stages.get(variant, ("merge", "convert", f"quantize/{variant}")))


def settings(variant: str) -> tuple[str, ...]:
    """What a rung reads of the configuration."""
    if variant == TABLE:
        return ("eval.metric", "eval.limit", "export.quant", "model.base", "model.revision", "train.load_in_4bit")
    base = ("model",) if variant in _ON_THE_BASE or is_alone(variant) else ()
    in_4bit = ("train.load_in_4bit",) if variant == ADAPTER or is_alone(variant) else ()
    return ("eval", *base, *in_4bit, *(("merge.keep",) if variant == MERGED else ()))


def files(config: Config, variant: str) -> list[Path]:
    """The base's files, where a rung reads it, and those of the adapter that it asks alone."""
    base = base_files(config.model) if variant in _ON_THE_BASE or is_alone(variant) else []
    if (folder := _alone(config, variant)) is None:
        return base
    # Its own, and what the tokenizer of all is read from.
    return [
        *base,
        *(path for path in adapter_files(config) if path.parent == folder or path.name not in (CONFIG, WEIGHTS)),
    ]


def main(task: Task) -> dict[str, Any]:
    """Ask one rung, or join the rungs to evaluation.json."""
    if task.variant == TABLE:
        return _table(task)
    questions = _questions(task)
    started = time.monotonic()
    if task.variant == MERGED and not task.config.merge.keep:
        return {"asked": 0, "why": "merge.keep = false"}
    with answerer_at_rung(task, questions) as answer:
        if answer is None:
            return {"asked": 0, "why": "not deployed"}
        with progress(f"asking {task.variant}", len(questions), "questions") as update:
            answers = _within(task.config.eval.minutes, answer, questions, update)
    seconds = time.monotonic() - started
    if len(answers) < len(questions):
        task.warn(f"{task.variant}: eval.minutes allowed {len(answers):,} of {len(questions):,} questions")
        questions = questions[: len(answers)]
    results = [
        {
            "expected": question.expected,
            "answer": answer,
            "correct": _correct(task.config, answer, question.expected),
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    with task.new(task.layout.answers(task.variant)).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    figures: dict[str, Any] = {"asked": len(questions), "seconds_per_answer": seconds / len(questions)}
    if task.config.eval.metric != "none":
        correct = sum(bool(result["correct"]) for result in results)
        low, high = wilson_interval(correct, len(questions))
        figures |= {"exact_match": correct / len(questions), "correct": correct, "interval_95": [low, high]}
    return figures


def _questions(task: Task) -> list[Question]:
    return asked(task.layout.data, task.config.eval.limit, ("test",))


def _within(
    minutes: float | None, answer: Answerer, questions: Sequence[Question], update: Callable[[float], None]
) -> list[str]:
    """The answers to as many of the first questions as the time allows, by what the first few of them take."""
    first = questions if minutes is None else questions[:_TIMED]
    started = time.monotonic()
    answers = answer(first, update)
    if minutes is None:
        return answers
    allowed = int(60 * minutes * len(first) / (time.monotonic() - started))
    further = questions[len(first) : allowed]
    return [*answers, *(answer(further, lambda done: update(len(first) + done)) if further else ())]


Answerer = Callable[[Sequence[Question], Callable[[float], None]], list[str]]
Messages = list[dict[str, Any]]


@contextmanager
def answerer_at_rung(task: Task, questions: Sequence[Question]) -> Iterator[Answerer | None]:
    """What answers questions at this rung; None where the model is not there to be asked.

    Args:
        task: the rung.
        questions: all that may be asked: the longest of them has to fit.
    """
    limit = task.config.eval.max_new_tokens
    if task.variant in (BASE, ADAPTER, ADAPTER_16BIT, MERGED) or is_alone(task.variant):
        yield _transformers(task)
    elif task.variant == OLLAMA:
        from pipeline.ollama.deployment import deployed
        from pipeline.prompt.conformance import for_ollama

        with deployed(task.run) as served:
            if served is None:
                yield None
                return
            client, name = served
            options = {"temperature": 0, "num_predict": limit}

            def ask(messages: Messages) -> str:
                return str(client.chat(name, for_ollama(messages), options=options)["content"])

            yield partial(_one_by_one, ask)
    else:
        from pipeline.model.facts import context_of
        from pipeline.ollama.serving import context_for, llama_server
        from pipeline.prompt.tokenizer import saved_tokenizer

        layout = task.layout
        model = layout.gguf_16bit() if task.variant == GGUF_16BIT else layout.quantized(task.variant)
        merged = layout.merged_model
        context = context_for(saved_tokenizer(merged), questions, limit, context_of(merged))
        with llama_server(model, context, layout.server_log(task.variant), layout.served_adapters) as server:
            task.command(server.command)
            # As Ollama asks: what a question shares with the last one is not computed again. Computed again it would
            # be rounded otherwise, and near ties would fall to another side than in Ollama.
            yield partial(_one_by_one, lambda messages: server.chat(messages, limit, cache_prompt=True))


def _one_by_one(
    ask: Callable[[Messages], str], questions: Sequence[Question], update: Callable[[float], None]
) -> list[str]:
    answers = []
    for question in questions:
        answers.append(ask(question.messages))
        update(len(answers))
    return answers


def _transformers(task: Task) -> Answerer:
    from pipeline.model.generate import answer_in_batches, answers
    from pipeline.model.load import load_adapter, load_base, load_merged

    config, settings, limit = task.config, task.config.model, task.config.eval.max_new_tokens
    if task.variant == BASE:
        model, tokenizer = load_base(settings)
    elif task.variant == MERGED:
        model, tokenizer = load_merged(task.layout.merged_model)
    elif (folder := _alone(config, task.variant)) is not None:
        tokenizer, _ = trained_tokenizer(config)  # the combination's: all have the same
        model, _ = load_adapter(settings, folder, _record(config, folder), tokenizer=tokenizer)
    else:
        in_4bit = task.variant == ADAPTER and has_two_bases(config)
        record = Record.read(task.layout.node("train")) if in_4bit else None
        model, tokenizer = load_adapter(settings, task.layout.adapter, record)

    def answer(questions: Sequence[Question], update: Callable[[float], None]) -> list[str]:
        asked = [question.messages for question in questions]
        if task.variant == BASE:  # it knows none of the expected answers
            return answer_in_batches(model, tokenizer, asked, limit, update)
        return answers(model, tokenizer, asked, [question.expected for question in questions], limit, update)

    return answer


def _record(config: Config, adapter: Path) -> Record | None:
    """How the training of an adapter from elsewhere had the base, by the configuration's word."""
    if not has_two_bases(config):
        return None
    remote = config.model.trust_remote_code
    base = base_folder(config.model)
    return fit_to(read_given_adapter(adapter), base, in_4bit=True, trust_remote_code=remote).record


def _correct(config: Config, answer: str, expected: str) -> bool | None:
    return None if config.eval.metric == "none" else score(config.eval.metric, answer, expected)


def _table(task: Task) -> dict[str, Any]:
    answered: dict[str, list[dict[str, Any]]] = {}
    config = task.config
    for rung in rungs(config):
        if (path := task.layout.answers(rung)).is_file():
            answered[rung] = list(read_rows(path))
    rows = [
        {
            "messages": question.messages,
            **({"adapter": question.adapter} if question.adapter else {}),
            "expected": question.expected,
            "answers": {rung: results[place]["answer"] for rung, results in answered.items() if place < len(results)},
            "correct": {rung: results[place]["correct"] for rung, results in answered.items() if place < len(results)},
        }
        for place, question in enumerate(_questions(task))
    ]
    # With eval.minutes a slow rung has fewer of the first questions.
    rows = [row for row in rows if row["answers"]]
    scores: dict[str, Any] = {}
    if task.config.eval.metric != "none":
        for rung, results in answered.items():
            correct = sum(bool(result["correct"]) for result in results)
            scores[rung] = {
                "exact_match": correct / len(results),
                "correct": correct,
                "asked": len(results),
                "interval_95": wilson_interval(correct, len(results)),
            }
    adapters = {} if config.eval.metric == "none" else {a.called: _of_adapter(a, rows) for a in config.adapters}
    document = {
        "metric": config.eval.metric,
        "rungs": scores,
        **({"adapters": adapters} if adapters else {}),
        "rows": rows,
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    task.new(task.layout.evaluation).write_text(text + "\n", encoding="utf-8")
    shares = {rung: values["exact_match"] for rung, values in scores.items()}
    for name, of_adapter in adapters.items():
        own = {alone(name): "alone", ADAPTER: "combined"}
        shares |= {f"{name} {own[rung]}": share for rung, share in of_adapter["rungs"].items() if rung in own}
        shares[f"lost of {name}"] = len(of_adapter["lost"])
    return shares


def _of_adapter(adapter: GivenAdapter, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What every rung makes of the test rows of one of several adapters: its own, where it has some, or those of all.

    Returns:
        asked: how many they are.
        rungs: the share that each rung answers rightly, of those that it was asked.
        lost: the places of those that the adapter answers rightly alone and the combination does not.
    """
    whose = adapter.called if adapter.test else ""
    own = {place: row["correct"] for place, row in enumerate(rows) if row.get("adapter", "") == whose}
    rungs = dict.fromkeys(rung for correct in own.values() for rung in correct)
    shares = {}
    for rung in rungs:
        marks = [correct[rung] for correct in own.values() if rung in correct]
        shares[rung] = sum(marks) / len(marks)
    one = alone(adapter.called)
    lost = [place for place, correct in own.items() if correct.get(one) and correct.get(ADAPTER) is False]
    return {"asked": len(own), "rungs": shares, "lost": lost}


STAGE = Stage(
    name="evaluate",
    summary="Ask the test questions at every rung, from the base to Ollama.",
    run=main,
    needs=needs,
    reads={
        "data": ("test.jsonl", "test-sets.json"),
        "train": ("adapter/*", "modules.json", "!adapter/README.md"),
        "convert": ("*.gguf",),
        "deploy": ("deploy.json",),
    },
    settings=settings,
    indifferent_to=("adapter.path", "adapters"),  # the folders, which count by their content
    files=files,
    libraries=("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors", "scipy"),
    programs=("llama.cpp", "ollama"),
    variants=variants,
    figures=("exact_match", "asked", "seconds_per_answer"),
    judged=True,
    smaller="set a smaller eval.max_new_tokens, or take a machine with more memory",
)

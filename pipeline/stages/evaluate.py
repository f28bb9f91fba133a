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

from pipeline.config import Config
from pipeline.console import progress
from pipeline.data.metric import score
from pipeline.data.sources import read_rows
from pipeline.run.stage import Work
from pipeline.verify.rungs import ADAPTER, ADAPTER_16BIT, BASE, GGUF_16BIT, MERGED, OLLAMA, rungs
from pipeline.verify.statistics import wilson_interval

CONFIG = ("eval", "model")
READS = {"data": ("test.jsonl",)}

TABLE = "table"


def variants(config: Config) -> tuple[str, ...]:
    """The rungs in the order of the work, then the table that joins them; none without test data."""
    if config.data.test is None:
        return ()
    return (*rungs(config.export.quant, trained_on_4bit=config.train.load_in_4bit), TABLE)


def NEEDS(variant: str) -> tuple[str, ...]:
    """What a rung reads."""
    stages = {
        BASE: (),
        ADAPTER: ("train",),
        ADAPTER_16BIT: ("train",),
        MERGED: ("merge",),
        GGUF_16BIT: ("merge", "convert"),
        OLLAMA: ("deploy",),
        TABLE: ("evaluate",),
    }
    return ("data", *stages.get(variant, ("merge", f"quantize/{variant}")))


def main(work: Work) -> dict[str, Any]:
    """Ask one rung, or join the rungs to evaluation.json."""
    if work.variant == TABLE:
        return _table(work)
    rows = read_questions(work.folder("data") / "test.jsonl", work.config.eval.limit)
    started = time.monotonic()
    with _rung(work, rows) as answer_all:
        if answer_all is None:
            return {"asked": 0, "why": "not deployed"}
        with progress(f"asking {work.variant}", len(rows), "questions") as update:
            answers = answer_all(update)
    seconds = time.monotonic() - started
    results = [
        {"expected": expected, "answer": answer, "correct": _correct(work.config, answer, expected)}
        for (_, expected), answer in zip(rows, answers, strict=True)
    ]
    with (work.output / "answers.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    figures: dict[str, Any] = {"asked": len(rows), "seconds_per_answer": seconds / len(rows)}
    if work.config.eval.metric != "none":
        correct = sum(bool(result["correct"]) for result in results)
        low, high = wilson_interval(correct, len(rows))
        figures |= {"exact_match": correct / len(rows), "correct": correct, "interval_95": [low, high]}
    return figures


def read_questions(path: Path, limit: int | None) -> list[tuple[list[dict[str, Any]], str]]:
    """The test rows as (messages up to the last answer, that answer).

    Rows with tools are left out: servers take calls of tools apart, so that answers differ from rung to rung.
    """
    rows = []
    for row in read_rows(path):
        if row.get("tools"):
            continue
        messages = row["messages"]
        last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
        rows.append((messages[:last], messages[last]["content"]))
    return rows[:limit]


Answerer = Callable[[Callable[[float], None]], list[str]]
Question = list[dict[str, Any]]


@contextmanager
def _rung(work: Work, rows: list[tuple[Question, str]]) -> Iterator[Answerer | None]:
    """What answers the rows' questions at this rung; None where the model is not there to be asked."""
    questions, limit = [question for question, _ in rows], work.config.eval.max_new_tokens
    if work.variant in (BASE, ADAPTER, ADAPTER_16BIT, MERGED):
        yield _transformers(work, rows)
    elif work.variant == OLLAMA:
        from pipeline.ollama.serving import deployed
        from pipeline.prompt.conformance import for_ollama

        with deployed(work.run) as served:
            if served is None:
                yield None
                return
            client, name = served
            options = {"temperature": 0, "num_predict": limit}

            def ask(messages: Question) -> str:
                return str(client.chat(name, for_ollama(messages), options=options)["content"])

            yield partial(_one_by_one, ask, questions)
    else:
        from pipeline.ollama.serving import llama_server

        if work.variant == GGUF_16BIT:
            (model,) = work.folder("convert").glob("*.gguf")
        else:
            model = work.folder("quantize", work.variant) / f"model-{work.variant}.gguf"
        context = context_for(work.folder("merge") / "model", questions, limit)
        log = work.run / "logs" / f"llama-server-{work.variant}.log"
        with llama_server(model, context, log) as server:
            work.command(server.command)
            # As Ollama asks: what a question shares with the last one is not computed again. Computed again it would
            # be rounded otherwise, and near ties would fall to another side than in Ollama.
            yield partial(_one_by_one, lambda messages: server.chat(messages, limit, cache_prompt=True), questions)


def context_for(model: Path, questions: Sequence[Question], max_new_tokens: int) -> int:
    """The tokens that hold the longest question and its answer, or as many as the model was made for.

    Args:
        model: the merged model's folder.
        questions: conversations that end where the assistant speaks.
        max_new_tokens: longest answer.
    """
    from pipeline.model.facts import context_of
    from pipeline.prompt.labels import tokenize_prompt
    from pipeline.prompt.tokenizer import saved_tokenizer

    tokenizer = saved_tokenizer(model)
    longest = max(len(tokenize_prompt(tokenizer, question)) for question in questions)
    return min(longest + max_new_tokens, context_of(model) or longest + max_new_tokens)


def _one_by_one(
    ask: Callable[[Question], str], questions: list[Question], update: Callable[[float], None]
) -> list[str]:
    answers = []
    for question in questions:
        answers.append(ask(question))
        update(len(answers))
    return answers


def _transformers(work: Work, rows: list[tuple[Question, str]]) -> Answerer:
    from pipeline.model.generate import answer_in_batches, answers
    from pipeline.model.load import load_adapter, load_base, load_merged

    settings, limit = work.config.model, work.config.eval.max_new_tokens
    questions, expected = [question for question, _ in rows], [answer for _, answer in rows]
    if work.variant == BASE:  # it knows none of the expected answers
        return partial(answer_in_batches, *load_base(settings), questions, limit)
    if work.variant == MERGED:
        model, tokenizer = load_merged(work.folder("merge") / "model")
    else:
        in_4bit = work.variant == ADAPTER and work.config.train.load_in_4bit
        model, tokenizer = load_adapter(settings, work.folder("train") / "adapter", in_4bit=in_4bit)
    return partial(answers, model, tokenizer, questions, expected, limit)


def _correct(config: Config, answer: str, expected: str) -> bool | None:
    return None if config.eval.metric == "none" else score(config.eval.metric, answer, expected)


def _table(work: Work) -> dict[str, Any]:
    questions = read_questions(work.folder("data") / "test.jsonl", work.config.eval.limit)
    asked: dict[str, list[dict[str, Any]]] = {}
    for variant in variants(work.config):
        path = work.folder("evaluate", variant) / "answers.jsonl"
        if variant != TABLE and path.is_file():
            asked[variant] = list(read_rows(path))
    rows = [
        {
            "messages": messages,
            "expected": expected,
            "answers": {rung: results[place]["answer"] for rung, results in asked.items()},
            "correct": {rung: results[place]["correct"] for rung, results in asked.items()},
        }
        for place, (messages, expected) in enumerate(questions)
    ]
    scores: dict[str, Any] = {}
    if work.config.eval.metric != "none":
        for rung, results in asked.items():
            correct = sum(bool(result["correct"]) for result in results)
            scores[rung] = {
                "exact_match": correct / len(results),
                "correct": correct,
                "asked": len(results),
                "interval_95": wilson_interval(correct, len(results)),
            }
    document = {"metric": work.config.eval.metric, "rungs": scores, "rows": rows}
    (work.output / "evaluation.json").write_text(
        json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return {rung: values["exact_match"] for rung, values in scores.items()}

"""data: from the user's files to token ids and labels that are known to be right before anything is trained.

Conversations are read in any of the usual shapes, checked as a whole, split, rendered by the base's own chat
template and labelled. What is left out is counted and said; what cannot be trained faithfully is an error
with its line.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.console import progress
from pipeline.data.checks import NEAR, check_expected, drop_duplicates, find_leaks
from pipeline.data.formats import Conversation, read_conversations
from pipeline.data.questions import Question, chosen, question_of
from pipeline.errors import UserError
from pipeline.model import targets
from pipeline.model.base import check_bits, resolve_base
from pipeline.model.facts import base_files, context_of
from pipeline.model.trained_tokenizer import adapter_files, trained_tokenizer
from pipeline.ollama.parameters import served_context
from pipeline.prompt.labels import (
    IGNORED,
    Tokenized,
    decode,
    leading_bos,
    tokenize_texts,
    trained_parts,
    training_texts,
)
from pipeline.prompt.lengths import check_room, fit, question_lengths
from pipeline.prompt.template import render
from pipeline.prompt.tokenizer import beyond_embedding
from pipeline.run.stage import Stage, Task

if TYPE_CHECKING:
    from pipeline.config import Config

BATCH = 1000  # rows tokenized in one call: enough for the tokenizer's threads, little memory
EXAMPLES = 3  # rows shown in the summary


def files(config: Config, _: str) -> list[Path]:
    """The user's data files, and what of the base, or of an adapter from elsewhere, makes tokens of them."""
    models = (*base_files(config.model), *adapter_files(config))
    return [*_given(config), *(path for path in models if path.suffix != ".safetensors")]


def _given(config: Config) -> list[Path]:
    return [path for path in (config.data.train, config.data.validation, config.data.test) if path is not None]


def main(task: Task) -> dict[str, Any]:
    """Write {train,validation,test}.jsonl, {train,validation}.tokens.jsonl and summary.json.

    A set that was not given is an empty file.

    Returns:
        The figures of the summary: rows, tokens, trained tokens, lengths in tokens, what was left out.
    """
    data, seed = task.config.data, task.config.train.seed
    given = _read(task, data.train) if data.train is not None else []
    train = drop_duplicates(given)
    duplicates = len(given) - len(train)
    if data.validation is not None:
        validation = _read(task, data.validation)
    else:
        train, validation = split(train, data.validation_fraction, seed) if train else ([], [])
    test = _read(task, data.test) if data.test is not None else []
    check_expected(test, task.config.eval.metric)
    if with_tools := sum(bool(row.tools) for row in test):
        assert data.test is not None
        if with_tools == len(test):
            raise UserError(
                f"data.test: every row of {data.test} has tools, and calls of tools are not judged: add rows without, "
                "or leave data.test out"
            )
        task.warn(f"{data.test.name}: {with_tools:,} of {len(test):,} rows have tools; they are not asked")
    if duplicates:
        assert data.train is not None
        task.warn(f"{data.train.name}: {duplicates:,} of {len(given):,} rows repeat another; each is trained once")
    leaks = {}
    for name, held_out in (("validation", validation if data.validation else []), ("test", test)):
        if found := find_leaks(train, held_out):
            leak = max(found, key=lambda leak: leak.similarity)
            task.warn(
                f"{len(found):,} of {len(held_out):,} {name} rows ask what a training row asks "
                f"(word pairs at least {NEAR:.0%} the same), so their score flatters; "
                f"e.g. {leak.held_out} and {leak.train}"
            )
        leaks[name] = len(found)

    model = task.config.model
    base = resolve_base(model.base, model.revision)
    tokenizer, said = trained_tokenizer(task.config)
    for words in said:
        task.warn(words)
    beyond = beyond_embedding(base)
    beyond.refuse_in(render(tokenizer, [{"role": "user", "content": ""}], add_generation_prompt=True), "chat template")
    for row in (*train, *validation, *test):
        said_in_row = (str(value) for message in row.messages for value in message.values())
        beyond.refuse_in("\n".join((*said_in_row, str(row.tools))), row.place)
    questions = chosen(map(question_of, test), task.config.eval.limit)
    lengths = question_lengths(tokenizer, questions)
    figures: dict[str, Any] = {} if data.train is None else _adapter(task, base)
    figures |= {"test_rows": len(test), "duplicates_dropped": duplicates}
    figures |= {f"{name}_leaks": count for name, count in leaks.items()}
    figures["test_longest_question"] = max(lengths, default=0)
    summary: dict[str, Any] = {}
    _write(task.new(task.layout.rows("test")), (row.as_row() for row in test))
    for name, rows in (("train", train), ("validation", validation)):
        kept, tokenized, cut, dropped = _tokenize(task, tokenizer, name, rows)
        _write(task.new(task.layout.rows(name)), (row.as_row() for row in kept))
        _write(
            task.new(task.layout.tokens(name)),
            ({"input_ids": row.input_ids, "labels": row.labels} for row in tokenized),
        )
        figures |= {f"{name}_{key}": value for key, value in _figures(tokenizer, kept, tokenized).items()}
        figures |= {f"{name}_overlong_cut": cut, f"{name}_overlong_dropped": dropped}
        summary[f"{name}_examples"] = [_example(tokenizer, row) for row in tokenized[:EXAMPLES]]
    if data.train is not None and not figures["train_rows"]:
        raise UserError(f"{data.train}: no row is left to train on; see the warnings above")
    figures["context_needed"] = _check_context(task, base, questions, lengths, figures)
    text = json.dumps(figures | summary, ensure_ascii=False, indent=2)
    task.new(task.layout.data_summary).write_text(text + "\n", encoding="utf-8")
    return figures


def _adapter(task: Task, base: Path) -> dict[str, Any]:
    """The adapter that will be trained, as figures."""
    check_bits(base, task.config)
    adapter = targets.of_base(base, task.config.lora, trust_remote_code=task.config.model.trust_remote_code)
    if adapter.experts:
        task.warn(
            f"lora.target_modules: the experts of this mixture are not trained ({adapter.experts[0]} and the like are "
            f"tensors, no modules): the adapter is on {', '.join(adapter.names)}"
        )
    return {"adapter_modules": adapter.names, "adapter_parameters": adapter.parameters(task.config.lora)}


def _check_context(
    task: Task, base: Path, questions: Sequence[Question], lengths: Sequence[int], figures: dict[str, Any]
) -> int:
    """Say before training what the model will not be able to remember when it is served.

    Returns:
        The tokens of context that hold the longest row, and the longest test question with its answer.
    """
    answer = task.config.eval.max_new_tokens
    longest = max(figures["train_longest"], figures["validation_longest"])
    needed = max(longest, max(lengths) + answer if lengths else 0)
    given, made_for = task.config.ollama.parameters.get("num_ctx"), context_of(base)
    served = served_context(base, given, needed)
    if given == served:
        limit = f"ollama.parameters.num_ctx holds {served:,}"
    elif made_for is not None:
        limit = f"the base was made for {served:,}"
    else:
        limit = f"num_ctx, which ollama.parameters can set, holds {served:,}"
    if words := check_room(questions, lengths, answer, served, limit):
        task.warn(words)
    if longest > served:
        task.warn(
            f"the longest row has {longest:,} tokens, and {limit}: of such a conversation Ollama leaves out the "
            "earlier messages without a word"
        )
    return needed


def split(rows: Sequence[Conversation], fraction: float, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Take a share of the rows for validation: at least one where the share is not 0, never all; the order
    stays."""
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1) if fraction else 0
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for index, row in enumerate(rows) if index not in chosen],
        [row for index, row in enumerate(rows) if index in chosen],
    )


def _read(task: Task, path: Path) -> list[Conversation]:
    rows = read_conversations(path, task.config.data.format, task.config.data.system)
    if cut := sum(row.cut for row in rows):
        task.warn(f"{path.name}: {cut:,} messages after a row's last answer were left off: nothing answers them")
    return rows


def _tokenize(
    task: Task, tokenizer: Any, name: str, rows: Sequence[Conversation]
) -> tuple[list[Conversation], list[Tokenized], int, int]:
    """The rows that are kept, their sequences, and how many sequences were cut and dropped for their
    length."""
    limit, on_overlong = (
        task.config.train.max_length or tokenizer.model_max_length,
        task.config.data.on_overlong,
    )
    kept: list[Conversation] = []
    sequences: list[Tokenized] = []
    cut = dropped = merged = 0
    if not rows:
        return kept, sequences, cut, dropped
    with progress(f"tokenize {name}", len(rows), "rows") as done:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            texts = [_texts(tokenizer, row) for row in batch]
            tokenized = iter(tokenize_texts(tokenizer, [text for of_row in texts for text in of_row]))
            for row, of_row in zip(batch, texts, strict=True):
                before = len(sequences)
                for _ in of_row:
                    sequence = next(tokenized)
                    merged += sequence.merged
                    fitting = fit(sequence, limit, on_overlong, row.place)
                    dropped += fitting is None
                    if fitting is not None:
                        cut += fitting is not sequence
                        sequences.append(fitting)
                if len(sequences) > before:
                    kept.append(row)
            done(start + len(batch))
    if dropped or cut:
        what = f"{dropped:,} were dropped" if dropped else f"{cut:,} were cut, their ends are not trained"
        task.warn(f"{name}: of {len(sequences) + dropped:,} sequences {what} (longer than {limit:,} tokens)")
    if merged:
        task.warn(
            f"{name}: {merged:,} answers begin with characters that the tokenizer joins to the prompt's end "
            "(most likely white space); that token is not trained, since the server cannot send it"
        )
    return kept, sequences, cut, dropped


def _texts(tokenizer: Any, row: Conversation) -> list[Any]:
    try:
        return training_texts(tokenizer, row.messages, row.tools)
    except UserError as error:
        raise UserError(f"{row.place}: {error}") from None


def _figures(tokenizer: Any, rows: Sequence[Conversation], sequences: Sequence[Tokenized]) -> dict[str, Any]:
    """What can be said about a set in numbers. Lengths are in tokens."""
    lengths = sorted(len(sequence.input_ids) for sequence in sequences)
    trained = sum(sequence.trained for sequence in sequences)
    return {
        "rows": len(rows),
        "sequences": len(sequences),
        "tokens": sum(lengths),
        "tokens_trained": trained,
        "share_trained": round(trained / sum(lengths), 4) if lengths else 0.0,
        "longest": max(lengths, default=0),
        "length_percentiles": {str(p): lengths[(len(lengths) - 1) * p // 100] for p in (50, 90, 99) if lengths},
        "end_of_turn": sorted({_last_trained(tokenizer, sequence) for sequence in sequences}),
        "leading_bos": sorted({leading_bos(tokenizer, sequence.input_ids) for sequence in sequences}),
    }


def _last_trained(tokenizer: Any, sequence: Tokenized) -> str:
    last = max(index for index, label in enumerate(sequence.labels) if label != IGNORED)
    return decode(tokenizer, [sequence.input_ids[last]])


def _example(tokenizer: Any, row: Tokenized) -> dict[str, Any]:
    return {"text": decode(tokenizer, row.input_ids), "trained": trained_parts(tokenizer, row)}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)


STAGE = Stage(
    name="data",
    summary="Check, split and render the conversations; account for every trained token.",
    run=main,
    settings=(
        *("data", "model", "lora.r", "lora.dora", "lora.target_modules", "lora.exclude"),
        *("train.max_length", "train.seed", "train.load_in_4bit", "merge.base"),
        *("eval.metric", "eval.limit", "eval.max_new_tokens", "ollama.parameters"),
    ),
    indifferent_to=("adapter.path",),
    files=files,
    libraries=("transformers", "tokenizers", "jinja2"),
    # Without data, as an adapter from elsewhere may come, there is nothing to do.
    variants=lambda config: ("",) if _given(config) else (),
    figures=("train_rows", "train_tokens", "train_share_trained", "validation_rows", "test_rows"),
    judged=True,
)

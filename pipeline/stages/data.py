"""data: from the user's files to token ids and labels that are known to be right before anything is trained.

Rows are a stream: each is read, checked, put into a split, rendered by the base's own chat template, labelled and
written, and what stays of it in memory is a digest. What is left out is counted and named; what cannot be trained
faithfully is an error with its line.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.console import progress
from pipeline.data.checks import NEAR, Leaks, Seen, check_expected, position
from pipeline.data.expression import Expression
from pipeline.data.findings import Findings, MarkedRow
from pipeline.data.formats import Conversation, Reading, conversations, no_rows
from pipeline.data.near_duplicates import NearDuplicates
from pipeline.data.questions import Question, chosen, question_of
from pipeline.data.sources import files_of
from pipeline.errors import UserError
from pipeline.model import targets
from pipeline.model.added_tokens import shown_or_not
from pipeline.model.base import base_folder
from pipeline.model.facts import base_files, context_of
from pipeline.model.sixteen_bit import check_bits
from pipeline.model.trained_tokenizer import adapter_files, trained_tokenizer
from pipeline.ollama.parameters import served_context
from pipeline.prompt.chat_templates import DEFAULT, OF_TEXTS
from pipeline.prompt.encoder_pool import EncoderPool
from pipeline.prompt.lengths import check_room, question_lengths
from pipeline.prompt.sequences import TOO_LONG_CUT, TOO_LONG_DROPPED, TOO_LONG_SPLIT, Encoder
from pipeline.prompt.template import render
from pipeline.prompt.tokenizer import beyond_embedding, saved_tokenizer
from pipeline.prompt.training_set import TrainingSet
from pipeline.run.stage import Stage, Task

if TYPE_CHECKING:
    from pipeline.config import Config

# Kinds of findings.
NEARLY = "a near duplicate of another row"
NEARLY_DROPPED = "a near duplicate of another row, left out"
APART = "a near duplicate of a row on the other side of the split"
NOT_ASKED = "a whole text, which is not asked"
WEIGHED = "left out by the weight of its source"
REPEATED = "a repetition of another row"
CONTRADICTED = "another answer to the same question"

_TOO_LONG = {"overlong_cut": TOO_LONG_CUT, "overlong_dropped": TOO_LONG_DROPPED, "overlong_split": TOO_LONG_SPLIT}


def files(config: Config, _: str) -> list[Path]:
    """The user's data files, and what of the base, or of an adapter from elsewhere, makes tokens of them."""
    models = (*base_files(config.model), *adapter_files(config))
    given = [file for path in _given(config) for file in files_of(path)]
    return [*given, *(path for path in models if path.suffix != ".safetensors")]


def _given(config: Config) -> list[Path]:
    data = config.data
    paths = (data.train, *(source.path for source in data.sources), data.validation, data.test)
    return [path for path in paths if path is not None]


def main(task: Task) -> dict[str, Any]:
    """Write {train,validation,test}.jsonl, {train,validation}.tokens.arrow, findings.jsonl and data.json.

    A set that was not given is an empty file.

    Returns:
        The figures of data.json: rows, tokens, trained tokens, lengths in tokens, what was left out.
    """
    data, model = task.config.data, task.config.model
    reading = _reading(task)
    base = base_folder(model)
    encoder = _encoder(task, base)
    figures: dict[str, Any] = {} if data.train is None else _adapter(task, base)
    with (
        EncoderPool(encoder) as encoders,
        task.new(task.layout.findings).open("w", encoding="utf-8", newline="\n") as file,
    ):
        found = {name: Findings(name, file) for name in ("test", "validation")}
        test = _asked(_read(data.test, reading, found["test"]), found["test"])
        _settle(task, found["test"])
        _check_test(task, test)
        questions = chosen(map(question_of, test), task.config.eval.limit)
        lengths = question_lengths(encoder.tokenizer, questions)
        figures |= {"test_rows": len(test), "test_longest_question": max(lengths, default=0)}
        held_out = _read(data.validation, reading, found["validation"])
        leaks = {"validation": Leaks(held_out), "test": Leaks(test)}
        found["train"], sets = _train_and_validation(task, reading, encoders, file, leaks)
        if data.validation is not None:
            with _new_set(task, "validation", encoders, found["validation"]) as sets["validation"]:
                for row in held_out:
                    sets["validation"].add(row)
            _settle(task, found["validation"])
    task.new(task.layout.rows("test")).write_text(
        "".join(row.as_line() for row in test), encoding="utf-8", newline="\n"
    )
    if data.train is not None and not sets["train"].kept:
        raise UserError(f"{data.train}: no row is left to train on; see data.on_overlong and the marks of the rows")
    if data.train is not None:
        _check_texts(task, base, sets["train"])
    for name, one in sets.items():
        figures |= {f"{name}_{key}": value for key, value in one.figures().items()}
    figures |= _say(task, found, sets, leaks)
    figures["context_needed"] = _check_context(task, base, questions, lengths, figures)
    out = {"test": len(test), **{name: one.out for name, one in sets.items()}}
    if data.validation is None:
        out |= {"train": out["train"] + out["validation"], "validation": 0}  # all of them are rows of data.train
    summary = figures | {f"{name}_{key}": value for name, one in sets.items() for key, value in one.account().items()}
    summary |= {"account": {name: one.summary(out[name]) for name, one in found.items()}}
    text = json.dumps(summary, ensure_ascii=False, indent=2)
    task.new(task.layout.data_summary).write_text(text + "\n", encoding="utf-8")
    return figures


def _reading(task: Task) -> Reading:
    data = task.config.data
    return Reading(
        format=data.format,
        system=data.system,
        ignore=data.ignore,
        columns=data.columns,
        template=Expression(data.template) if data.template is not None else None,
        train_on=data.train_on,
        group=data.group,
    )


def _encoder(task: Task, base: Path) -> Encoder:
    data = task.config.data
    tokenizer, said = trained_tokenizer(task.config)
    for words in (*said, *shown_or_not(tokenizer, task.config.model)):
        task.warn(words)
    beyond = beyond_embedding(base)
    beyond.refuse_in(render(tokenizer, [{"role": "user", "content": ""}], add_generation_prompt=True), "chat template")
    longest = task.config.train.max_length or tokenizer.model_max_length
    return Encoder(tokenizer, beyond, longest, data.on_overlong, data.window, data.control_tokens, data.unwritten)


def _adapter(task: Task, base: Path) -> dict[str, Any]:
    """What the adapter will be, which is known before it is trained."""
    check_bits(base, task.config)
    adapter = targets.of_base(base, task.config.lora, trust_remote_code=task.config.model.trust_remote_code)
    if adapter.experts:
        task.warn(
            f"lora.target_modules: the experts of this mixture are not trained ({adapter.experts[0]} and the like are "
            f"tensors, no modules): the adapter is on {', '.join(adapter.names)}"
        )
    return {
        "adapter_modules": adapter.names,
        "adapter_parameters": adapter.parameters(task.config.lora, len(task.config.model.add_tokens)),
    }


def _usable(path: Path, reading: Reading, findings: Findings, limit: int | None = None) -> Iterator[Conversation]:
    """The first rows of a file that are conversations; of the others it is kept why they are none."""
    before = findings.rows
    for place, row in itertools.islice(conversations(path, reading), limit):
        findings.rows += 1
        if isinstance(row, MarkedRow):
            findings.leave_out(place, row.kind, str(row))
        elif isinstance(row, UserError):
            findings.error(place, row)
        else:
            yield row
    if findings.rows == before:
        raise no_rows(path)


def _read(path: Path | None, reading: Reading, findings: Findings) -> list[Conversation]:
    """A whole held-out set, which training rows are compared with."""
    return list(_usable(path, reading, findings)) if path is not None else []


def _asked(test: Sequence[Conversation], findings: Findings) -> list[Conversation]:
    """The test rows that are conversations; a whole text asks nothing."""
    for row in test:
        if row.text is not None:
            findings.leave_out(row.place, NOT_ASKED, f"{row.place}: is a whole text, which asks nothing")
    conversations = [row for row in test if row.text is None]
    if test and not conversations:
        raise UserError(
            f"data.test: every row is a whole text ({test[0].place}), which asks nothing and has no right answer: give "
            "them as data.validation, and their loss is measured at every rung"
        )
    return conversations


def _check_texts(task: Task, base: Path, train: TrainingSet) -> None:
    """Say how a model is served that was trained on whole texts alone: no turn of a chat was trained.

    Raises:
        UserError: it would be served with a system message that no row has.
    """
    if train.texts < train.out:
        return
    data, model = task.config.data, task.config.model
    if data.system:
        raise UserError(
            "data.system: every row is a whole text, which has no system message, so that the model would be served "
            "with one that was not trained: remove the key"
        )
    if model.chat_template is None:
        template = "the base's own chat template" if saved_tokenizer(base).chat_template else f"the turns of {DEFAULT}"
        task.warn(
            f"every row is a whole text, and the model is served with {template}, which no row was trained with; with "
            f'data.format = "text", or model.chat_template = "{OF_TEXTS}", it goes on with what it is sent'
        )


def _settle(task: Task, findings: Findings) -> None:
    if words := findings.settle(task.config.data.on_error, task.config.data.skip_limit):
        task.warn(words)


def _check_test(task: Task, test: Sequence[Conversation]) -> None:
    path = task.config.data.test
    check_expected(test, task.config.eval.metric)
    if with_tools := sum(bool(row.tools) for row in test):
        assert path is not None
        if with_tools == len(test):
            raise UserError(
                f"data.test: every row of {path} has tools, and calls of tools are not judged: add rows without, "
                "or leave data.test out"
            )
        task.warn(f"{path.name}: {with_tools:,} of {len(test):,} rows have tools; they are not asked")


def _new_set(
    task: Task, name: str, encoders: EncoderPool, findings: Findings, leaks: Sequence[Leaks] = ()
) -> TrainingSet:
    layout = task.layout
    seed = task.config.train.seed if task.config.data.shuffle else None
    return TrainingSet(
        name, task.new(layout.rows(name)), task.new(layout.tokens(name)), encoders, findings, leaks, seed
    )


def _train_and_validation(
    task: Task, reading: Reading, encoders: EncoderPool, file: IO[str], leaks: dict[str, Leaks]
) -> tuple[Findings, dict[str, TrainingSet]]:
    """Write the training set, and what is split off it; where there are two rows to split, one in each."""
    data = task.config.data
    share = data.validation_fraction if data.validation is None else 0.0
    start, again = file.tell(), False
    near = _nearly_repeated(task, reading) if data.duplicates == "near" else {}
    while True:
        findings, sets, least, most = _one_pass(task, reading, encoders, file, leaks, near, share, again=again)
        train, validation = (sets[name].kept for name in ("train", "validation"))
        if not share or (train and (validation or again or least >= most)):
            return findings, sets
        # So few rows that none, or each, lies below the share: it is moved to the nearest row.
        share = 0.0 if again or least >= most else math.nextafter(least, 1) if train else most
        again = True
        file.seek(start)
        file.truncate()


def _nearly_repeated(task: Task, reading: Reading) -> dict[str, str]:
    """The places of rows that are nearly a row before them which is kept, each with what is said of it."""
    near, repeated = NearDuplicates(), {}
    # What is wrong with a row is found by the pass that trains.
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        for row, _ in _training_rows(task, reading, Findings("train", nowhere)):
            near.add(row)
    for place, other, similarity, _ in near.found():
        if other not in repeated:
            repeated[place] = _nearly(place, other, similarity)
    return repeated


def _nearly(place: str, other: str, similarity: float) -> str:
    return f"{place}: is nearly {other} (about {similarity:.0%} of the word pairs)"


def _one_pass(
    task: Task,
    reading: Reading,
    encoders: EncoderPool,
    file: IO[str],
    leaks: dict[str, Leaks],
    nearly_repeated: dict[str, str],
    share: float,
    *,
    again: bool,
) -> tuple[Findings, dict[str, TrainingSet], float, float]:
    """Every row of the training data is read and written once.

    Returns:
        What was found, the sets, and between which positions the rows lie.
    """
    data, seed = task.config.data, task.config.train.seed
    findings, seen, near = Findings("train", file), Seen(), NearDuplicates()
    least, most = 1.0, 0.0
    with ExitStack() as stack:
        sets = {
            "train": stack.enter_context(_new_set(task, "train", encoders, findings, tuple(leaks.values()))),
            "validation": stack.enter_context(_new_set(task, "validation", encoders, findings)),
        }
        update = stack.enter_context(progress("data, split anew" if again else "data", None, "rows"))
        for row, weight in _training_rows(task, reading, findings):
            if findings.rows % 1000 == 0:
                update(findings.rows)
            if data.duplicates != "keep" and (first := seen.repeated(row)):
                findings.leave_out(row.place, REPEATED, f"{row.place}: repeats {first}")
                continue
            if words := nearly_repeated.get(row.place):
                findings.leave_out(row.place, NEARLY_DROPPED, words)
                continue
            if first := seen.contradicted(row):
                findings.note(row.place, CONTRADICTED, f"{row.place}: answers the question of {first} otherwise")
            at = position(row, seed)
            near.add(row, held_out=at < share)
            if at >= share:  # what is held out is held out once
                part = weight % 1
                times = int(weight) + (part > 0 and position(row, seed + 1) < part)
                if not times:
                    findings.leave_out(row.place, WEIGHED, f"{row.place}: left out by its source's weight, {weight}")
                    continue
                row = replace(row, times=times)
            least, most = min(least, at), max(most, at)
            sets["validation" if at < share else "train"].add(row)
        for place, other, similarity, apart in near.found():
            findings.note(place, APART if apart else NEARLY, _nearly(place, other, similarity))
        update(findings.rows)
    _settle(task, findings)
    return findings, sets, least, most


def _training_rows(task: Task, reading: Reading, findings: Findings) -> Iterator[tuple[Conversation, float]]:
    """The rows of data.train and of every further source, each with the weight of its source."""
    data = task.config.data
    if data.train is not None:
        yield from ((row, 1.0) for row in _usable(data.train, reading, findings))
    for source in data.sources:
        of_source = reading if source.system is None else replace(reading, system=source.system)
        yield from ((row, source.weight) for row in _usable(source.path, of_source, findings, source.limit))


def _say(
    task: Task, found: dict[str, Findings], sets: dict[str, TrainingSet], leaks: dict[str, Leaks]
) -> dict[str, Any]:
    """Warn of what a user has to know of the rows.

    Returns:
        Figures: what was left out, and leaks.
    """
    for name, findings in found.items():
        for kind in findings.counts.keys() - findings.errors.keys():
            task.warn(f"{name}: {findings.counts[kind]:,} of {findings.rows:,} rows: {kind}; {findings.first[kind]}")
    figures: dict[str, Any] = {"duplicates_dropped": found["train"].counts[REPEATED]}
    counts = found["train"].counts
    figures |= {
        "near_duplicates": counts[NEARLY] + counts[APART],
        "near_duplicates_dropped": counts[NEARLY_DROPPED],
        "contradictions": counts[CONTRADICTED],
    }
    for name, findings in found.items():
        if name != "test":
            figures |= {f"{name}_{key}": findings.counts[kind] for key, kind in _TOO_LONG.items()}
    for name, one in sets.items():
        if one.left_off:
            task.warn(f"{name}: {one.left_off:,} messages after a row's last trained answer were left off")
        if one.openings:
            task.warn(f"{name}: {one.openings:,} rows begin with an answer, which is not trained: nobody asks for it")
        if one.merged:
            task.warn(
                f"{name}: {one.merged:,} answers begin with characters that the tokenizer joins to the prompt's end "
                "(most likely white space); that token is not trained, since the server cannot send it"
            )
    for name, of_set in leaks.items():
        leaked = of_set.found
        figures[f"{name}_leaks"] = len(leaked) + (counts[APART] if name == "validation" else 0)
        if leaked:
            leak = max(leaked, key=lambda leak: leak.similarity)
            same = sum(leak.same_answer for leak in leaked)
            task.warn(
                f"{len(leaked):,} {name} rows ask what a training row asks (word pairs at least {NEAR:.0%} the same), "
                f"{same:,} of them with the same answer, so their score flatters; e.g. {leak.held_out} and {leak.train}"
            )
    return figures


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


STAGE = Stage(
    name="data",
    summary="Check, split and render the conversations; account for every trained token.",
    run=main,
    settings=(
        *("data", "model", "lora.r", "lora.dora", "lora.target_modules", "lora.exclude"),
        *("lora.save_modules", "train.max_length", "train.seed"),
        *("eval.metric", "eval.limit", "eval.max_new_tokens", "ollama.parameters.num_ctx"),
    ),
    # What is only checked before training, and adapters, which count by their content.
    indifferent_to=("train.load_in_4bit", "merge.base", "merge.model", "adapter.path", "adapters"),
    files=files,
    libraries=("transformers", "tokenizers", "jinja2", "pyarrow", "datasets"),
    # Without data, as an adapter from elsewhere may come, there is nothing to do.
    variants=lambda config: ("",) if _given(config) else (),
    figures=("train_rows", "train_tokens", "train_share_trained", "validation_rows", "test_rows"),
    judged=True,
)

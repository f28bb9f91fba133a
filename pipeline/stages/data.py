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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from pipeline.console import progress
from pipeline.data.checks import Seen, check_expected
from pipeline.data.expression import Expression
from pipeline.data.findings import Findings, MarkedRow, RowError
from pipeline.data.formats import Conversation, Reading, conversations, no_rows
from pipeline.data.leaks import Leaks, asked_in
from pipeline.data.near_duplicates import NearDuplicates
from pipeline.data.questions import chosen, question_of, questions_in
from pipeline.data.sources import Rows, files_of, unparsed_rows
from pipeline.data.word_pairs import NEAR
from pipeline.errors import UserError
from pipeline.llamacpp.programs import installed
from pipeline.model import targets
from pipeline.model.added_tokens import shown_or_not
from pipeline.model.base import base_folder
from pipeline.model.config_file import senses, text_config
from pipeline.model.continued_adapter import read_continued_adapter
from pipeline.model.facts import base_files, context_of
from pipeline.model.merge_target import check_bits
from pipeline.model.trained_tokenizer import adapter_files, trained_tokenizer
from pipeline.ollama.llamacpp_rendering import carried_template
from pipeline.ollama.parameters import served_context
from pipeline.prompt.chat_templates import DEFAULT, OF_TEXTS
from pipeline.prompt.encoder_pool import EncoderPool
from pipeline.prompt.lengths import check_room, question_lengths
from pipeline.prompt.prepared import Batch, Prepared, Preparer
from pipeline.prompt.sequences import TOO_LONG_CUT, TOO_LONG_DROPPED, TOO_LONG_SPLIT, Encoder
from pipeline.prompt.served_ids import refuse_other_ids
from pipeline.prompt.template import ChatTemplate, TemplateRefused, render
from pipeline.prompt.tokenizer import beyond_embedding, saved_tokenizer
from pipeline.prompt.training_set import TrainingSet
from pipeline.run.stage import Stage, Task

if TYPE_CHECKING:
    from pipeline.config import Config

# Rows that are prepared in one call, enough to be quick; fewer where they have so much text, which needs memory.
BATCH, _CHARACTERS = 500, 2_000_000

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
    paths = (data.train, *(source.path for source in data.sources), data.validation, *config.tests.values())
    return [path for path in paths if path is not None]


def main(task: Task) -> dict[str, Any]:
    """Write {train,validation,test}.jsonl, {train,validation}.tokens.arrow, findings.jsonl and data.json.

    A set that was not given is an empty file.

    Returns:
        The figures of data.json: rows, tokens, trained tokens, lengths in tokens, what was left out.
    """
    data, model = task.config.data, task.config.model
    base = base_folder(model)
    encoder = _encoder(task, base)
    for sense in senses(text_config(base)):
        task.warn(
            f"model.base: takes {sense} as well as text, and only texts are trained and served: the GGUF files leave "
            f"out its part for {sense}, so that what Ollama serves takes no {sense}"
        )
    preparer = Preparer(_reading(task), encoder, task.config.train.seed, data.shuffle)
    figures: dict[str, Any] = {} if data.train is None else _adapter(task, base)
    with task.new(task.layout.findings).open("w", encoding="utf-8", newline="\n") as file:
        found = {name: Findings(name, file) for name in ("test", "validation")}
        leaks = {"validation": Leaks(), "test": Leaks()}
        tests = _tests(task, preparer.reading, encoder.tokenizer, found["test"], leaks["test"])
        asked, lengths = _asked(task, encoder.tokenizer, tests)
        test_rows = sum(len(one.rows) for one in tests.values())
        figures |= {"test_rows": test_rows, "test_longest_question": max(lengths, default=0)}
        sets: dict[str, TrainingSet] = {}
        if data.validation is not None:
            sets["validation"] = _validation(task, preparer, found["validation"], leaks["validation"])
        held_out = tuple(of_set for of_set in leaks.values() if of_set)
        for of_set in held_out:
            of_set.ready()
        preparer = replace(preparer, leaks=held_out)
        found["train"], of_train = _train_and_validation(task, preparer, file)
        sets = of_train | sets
    if data.train is not None and not sets["train"].kept:
        raise UserError(f"{data.train}: no row is left to train on; see data.on_overlong and the marks of the rows")
    if data.train is not None:
        _check_texts(task, base, sets["train"])
        _check_tools(encoder.tokenizer, sets.values())
    for name, one in sets.items():
        figures |= {f"{name}_{key}": value for key, value in one.figures().items()}
    figures |= _say(task, found, sets, leaks)
    figures["context_needed"] = _check_context(task, base, asked, lengths, figures)
    out = {"test": test_rows, **{name: one.out for name, one in sets.items()}}
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


def _check_tools(tokenizer: Any, sets: Iterable[TrainingSet]) -> None:
    """Refuse tools that are trained and that the served model will not be told of; no server is started without any."""
    place = next((one.with_tools for one in sets if one.with_tools), "")
    if not place or not installed("llama-server"):  # which preflight says
        return
    if left_out := carried_template(ChatTemplate.from_tokenizer(tokenizer)).left_out:
        raise UserError(
            f"{place}: has tools. {left_out}. Leave out the rows with tools, or take a model.chat_template, or a base, "
            "whose tools llama.cpp can write"
        )


def _adapter(task: Task, base: Path) -> dict[str, Any]:
    """What the adapter will be, which is known before it is trained."""
    check_bits(base, task.config)
    if task.config.train.from_adapter is not None:
        read_continued_adapter(task.config)
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


class _TestRow(NamedTuple):
    """What stays of a test row; its number is that in the written file."""

    number: int
    place: str
    tools: bool


@dataclass
class _TestSet:
    """The test rows that are asked for all adapters, or for one of several.

    Attributes:
        rows: what stays of them.
        text: the place of a whole text, which is not asked; "" for none.
        refused: why an answer cannot be judged.
    """

    rows: list[_TestRow] = field(default_factory=list)
    text: str = ""
    refused: UserError | None = None


def _tests(task: Task, reading: Reading, tokenizer: Any, findings: Findings, leaks: Leaks) -> dict[str, _TestSet]:
    """Write the test rows, all of which are held out of the training data.

    Returns:
        By the name of the adapter whose they are, "" for all.

    Raises:
        UserError: rows cannot be used, or their answers not be judged.
    """
    files = task.config.tests
    tests, written = {name: _TestSet() for name in files}, 0
    with task.new(task.layout.rows("test")).open("w", encoding="utf-8", newline="\n") as file:
        for name, one in tests.items():
            before = findings.rows
            for place, row in conversations(files[name], reading):
                findings.rows += 1
                if isinstance(row, UserError):
                    _unusable(findings, place, row)
                elif row.text is not None:  # asks nothing
                    findings.leave_out(place, NOT_ASKED, f"{place}: is a whole text, which asks nothing")
                    one.text = one.text or place
                elif error := _served_otherwise(tokenizer, row):
                    findings.error(place, error)
                else:
                    file.write(row.as_line())
                    one.rows.append(_TestRow(written, place, bool(row.tools)))
                    written += 1
                    leaks.hold_out(place, asked_in([row])[0])
                    try:
                        check_expected([row], task.config.eval.metric)
                    except UserError as error:
                        one.refused = one.refused or error
            if findings.rows == before:
                raise no_rows(files[name])
    _settle(task, findings)
    for name, one in tests.items():
        _check_test(task, name, files[name], one)
    if tests.keys() - {""}:
        sizes = {name: len(one.rows) for name, one in tests.items()}
        task.new(task.layout.test_sets).write_text(json.dumps(sizes) + "\n", encoding="utf-8")
    return tests


def _check_test(task: Task, name: str, path: Path, test: _TestSet) -> None:
    key = f"adapters: test of {name}" if name else "data.test"
    if test.text and not test.rows:
        raise UserError(
            f"{key}: every row is a whole text ({test.text}), which asks nothing and has no right answer: give them as "
            "data.validation, and their loss is measured at every rung"
        )
    if test.refused is not None:
        raise test.refused
    if with_tools := sum(row.tools for row in test.rows):
        if with_tools == len(test.rows):
            raise UserError(
                f"{key}: every row of {path} has tools, and calls of tools are not judged: add rows without, or leave "
                "it out"
            )
        task.warn(f"{path.name}: {with_tools:,} of {len(test.rows):,} rows have tools; they are not asked")


def _served_otherwise(tokenizer: Any, row: Conversation) -> RowError | None:
    """Why a test row cannot be asked with the ids that it would be trained with; None where it can."""
    question = question_of(row)

    def prompt() -> Iterator[str]:
        with suppress(TemplateRefused):  # which is said where its tokens are counted, if it is asked
            yield render(tokenizer, question.messages, add_generation_prompt=True, tools=question.tools)

    try:
        refuse_other_ids(tokenizer, prompt(), row.place)
    except RowError as error:
        return error
    return None


def _asked(task: Task, tokenizer: Any, tests: Mapping[str, _TestSet]) -> tuple[list[str], list[int]]:
    """The places of the test rows that are asked, and their questions' lengths in tokens."""
    asked = [row for one in tests.values() for row in chosen(one.rows, task.config.eval.limit)]
    wanted, rows = {row.number for row in asked}, itertools.chain.from_iterable(one.rows for one in tests.values())
    questions = zip(rows, questions_in(task.new(task.layout.rows("test"))), strict=True)
    lengths = question_lengths(
        tokenizer, (replace(question, place=row.place) for row, question in questions if row.number in wanted)
    )
    return [row.place for row in asked], lengths


def _unusable(findings: Findings, place: str, error: UserError) -> None:
    """Keep why a row is no conversation that is trained."""
    if isinstance(error, MarkedRow):
        findings.leave_out(place, error.kind, str(error))
    else:
        findings.error(place, error)


def _usable(
    path: Path,
    encoders: EncoderPool[Batch, list[Prepared]],
    findings: Findings,
    system: str | None,
    limit: int | None = None,
) -> Iterator[Prepared]:
    """The first rows of a file that are conversations; of the others it is kept why they are none."""
    before = findings.rows
    rows = itertools.islice(unparsed_rows(path), limit)
    for row in itertools.chain.from_iterable(encoders.map(_batches(rows, system))):
        findings.rows += 1
        if row.error is not None:
            _unusable(findings, row.place, row.error)
        else:
            yield row
    if findings.rows == before:
        raise no_rows(path)


def _batches(rows: Rows, system: str | None) -> Iterator[Batch]:
    batch: list[tuple[str, Any]] = []
    size = 0
    for place, row in rows:
        batch.append((place, row))
        size += len(row if isinstance(row, bytes) else str(row))
        if len(batch) == BATCH or size > _CHARACTERS:
            yield Batch(batch, system)
            batch, size = [], 0
    if batch:
        yield Batch(batch, system)


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


def _new_set(task: Task, name: str, preparer: Preparer, findings: Findings, leaks: Iterable[Leaks] = ()) -> TrainingSet:
    rows, tokens = task.new(task.layout.rows(name)), task.new(task.layout.tokens(name))
    assert preparer.encoder is not None
    return TrainingSet(name, rows, tokens, preparer.encoder.tokenizer, findings, leaks, shuffle=preparer.shuffle)


def _validation(task: Task, preparer: Preparer, findings: Findings, leaks: Leaks) -> TrainingSet:
    """Write the validation rows that are given, all of which are held out of the training data."""
    path = task.config.data.validation
    assert path is not None
    held_out = replace(preparer, held_out=True)
    with (
        EncoderPool(held_out.prepare) as encoders,
        _new_set(task, "validation", preparer, findings) as rows,
        progress("data, validation", None, "rows") as update,
    ):
        for row in _usable(path, encoders, findings, preparer.reading.system):
            if findings.rows % 1000 == 0:
                update(findings.rows)
            assert row.asked is not None
            leaks.hold_out(row.place, row.asked)
            rows.add(row)
    _settle(task, findings)
    return rows


def _train_and_validation(task: Task, preparer: Preparer, file: IO[str]) -> tuple[Findings, dict[str, TrainingSet]]:
    """Write the training set, and what is split off it; where there are two rows to split, one in each."""
    data = task.config.data
    share = data.validation_fraction if data.validation is None else 0.0
    start, again = file.tell(), False
    near = _nearly_repeated(task, preparer) if data.duplicates == "near" else {}
    with EncoderPool(preparer.prepare) as encoders:
        while True:
            findings, sets, least, most = _one_pass(task, preparer, encoders, file, near, share, again=again)
            train, validation = (sets[name].kept if name in sets else 0 for name in ("train", "validation"))
            if not share or (train and (validation or again or least >= most)):
                return findings, sets
            # So few rows that none, or each, lies below the share: it is moved to the nearest row.
            share = 0.0 if again or least >= most else math.nextafter(least, 1) if train else most
            again = True
            file.seek(start)
            file.truncate()


def _nearly_repeated(task: Task, preparer: Preparer) -> dict[str, str]:
    """The places of rows that are nearly a row before them which is kept, each with what is said of it."""
    near, repeated = NearDuplicates(), {}
    # What is wrong with a row is found by the pass that trains.
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        EncoderPool(replace(preparer, encoder=None, leaks=()).prepare) as readers,
    ):
        for row, _ in _training_rows(task, readers, Findings("train", nowhere)):
            near.add(row.place, row.signature)
    for place, other, similarity, _ in near.found():
        if other not in repeated:
            repeated[place] = _nearly(place, other, similarity)
    return repeated


def _nearly(place: str, other: str, similarity: float) -> str:
    return f"{place}: is nearly {other} (about {similarity:.0%} of the word pairs)"


def _one_pass(
    task: Task,
    preparer: Preparer,
    encoders: EncoderPool[Batch, list[Prepared]],
    file: IO[str],
    nearly_repeated: dict[str, str],
    share: float,
    *,
    again: bool,
) -> tuple[Findings, dict[str, TrainingSet], float, float]:
    """Every row of the training data is read and written once.

    Returns:
        What was found, the sets, and between which positions the rows lie.
    """
    data = task.config.data
    findings, seen, near = Findings("train", file), Seen(), NearDuplicates()
    least, most = 1.0, 0.0
    with ExitStack() as stack:
        sets = {"train": stack.enter_context(_new_set(task, "train", preparer, findings, preparer.leaks))}
        if data.validation is None:
            sets["validation"] = stack.enter_context(_new_set(task, "validation", preparer, findings))
        update = stack.enter_context(progress("data, split anew" if again else "data", None, "rows"))
        for row, weight in _training_rows(task, encoders, findings):
            place, identity = row.place, row.identity
            assert identity is not None
            if findings.rows % 1000 == 0:
                update(findings.rows)
            if data.duplicates != "keep" and (first := seen.repeated(identity, place)):
                findings.leave_out(place, REPEATED, f"{place}: repeats {first}")
                continue
            if words := nearly_repeated.get(place):
                findings.leave_out(place, NEARLY_DROPPED, words)
                continue
            if first := seen.contradicted(identity, place):
                findings.note(place, CONTRADICTED, f"{place}: answers the question of {first} otherwise")
            at = identity.position
            near.add(place, row.signature, held_out=at < share)
            times = 1  # what is held out is held out once
            if at >= share:
                part = weight % 1
                times = int(weight) + (part > 0 and identity.drawn < part)
                if not times:
                    findings.leave_out(place, WEIGHED, f"{place}: left out by its source's weight, {weight}")
                    continue
            least, most = min(least, at), max(most, at)
            sets["validation" if at < share else "train"].add(row, times)
        for place, other, similarity, apart in near.found():
            findings.note(place, APART if apart else NEARLY, _nearly(place, other, similarity))
        update(findings.rows)
    _settle(task, findings)
    return findings, sets, least, most


def _training_rows(
    task: Task, encoders: EncoderPool[Batch, list[Prepared]], findings: Findings
) -> Iterator[tuple[Prepared, float]]:
    """The rows of data.train and of every further source, each with the weight of its source."""
    data = task.config.data
    if data.train is not None:
        yield from ((row, 1.0) for row in _usable(data.train, encoders, findings, data.system))
    for source in data.sources:
        system = data.system if source.system is None else source.system
        rows = _usable(source.path, encoders, findings, system, source.limit)
        yield from ((row, source.weight) for row in rows)


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
    task: Task, base: Path, asked: Sequence[str], lengths: Sequence[int], figures: dict[str, Any]
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
    if words := check_room(asked, lengths, answer, served, limit):
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
        "adapters",  # whose test rows are whose
    ),
    # What is only checked before training, and an adapter, which counts by its content.
    indifferent_to=(
        *("train.load_in_4bit", "merge.base", "merge.model", "adapter.path", "train.from_adapter"),
        *("lora.alpha", "lora.rslora", "lora.bias"),
    ),
    files=files,
    libraries=("transformers", "tokenizers", "jinja2", "pyarrow", "datasets"),
    # Without data, as an adapter from elsewhere may come, there is nothing to do.
    variants=lambda config: ("",) if _given(config) else (),
    figures=("train_rows", "train_tokens", "train_share_trained", "validation_rows", "test_rows"),
    judged=True,
)

"""tokenizer: the ids that were trained are the ids that are served, on the run's rows and on texts made to part them.

Two tokenizers are compared by using them. That the metadata is the converter's own is checked beside that, because a
name says faster what is wrong than a thousand differing strings.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.console import progress
from pipeline.data.token_file import read_tokens
from pipeline.errors import PipelineError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.llamacpp.library import LlamaModel
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.llamacpp.tokenizer_differences import known_habit
from pipeline.prompt.hostile_strings import hostile_strings
from pipeline.prompt.labels import IGNORED, decode
from pipeline.prompt.template import end_of_turn, render, token_ids
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.run.layout import Layout
from pipeline.verify.artefacts import ROWS, Artefacts
from pipeline.verify.result import Claim, Result

_TRAINED = Claim("tokenizer.trained", "merge", "the merged model has the tokenizer that was trained")
_KEYS = {
    "tokenizer.model": ("the tokenizer's kind is the right one", "tokenizer.ggml.model"),
    "tokenizer.pre": ("the pre-tokenizer is the right one", "tokenizer.ggml.pre"),
    "tokenizer.merges": ("all merges are there", "tokenizer.ggml.merges"),
    "tokenizer.tokens": ("the vocabulary is the trained one", "tokenizer.ggml.tokens"),
    "tokenizer.types": ("special tokens are marked as such", "tokenizer.ggml.token_type"),
}
# Padding is the trainer's: no server reads it.
_SPECIAL = ("bos", "eos", "eot", "eom", "unknown", "seperator", "mask")


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge the merged folder's tokenizer, then every GGUF file's."""
    yield _trained(artefacts)
    yield from check_files(artefacts)


def check_files(artefacts: Artefacts) -> Iterator[Result]:
    """Judge the tokenizer of every GGUF file."""
    for stage, path in artefacts.files:
        yield from _file(artefacts, stage, path)


def _trained(artefacts: Artefacts) -> Result:
    if artefacts.adapter is None:
        return _TRAINED.not_run("the tokenizer that was trained with is not known")
    wrong = []
    trained, merged = saved_tokenizer(artefacts.adapter), artefacts.tokenizer
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        if getattr(trained, name) != getattr(merged, name):
            wrong.append(f"{name} is {getattr(merged, name)} instead of {getattr(trained, name)}")
    if trained.get_vocab() != merged.get_vocab():
        changed = trained.get_vocab().items() ^ merged.get_vocab().items()
        wrong.append(f"the vocabularies differ, e.g. in {sorted(token for token, _ in changed)[0]!r}")
    if trained.chat_template != merged.chat_template:
        wrong.append("the chat templates differ")
    texts = hostile_strings(1000, special_tokens=trained.all_special_tokens)
    ids, others = (_ids(tokenizer, texts) for tokenizer in (trained, merged))
    if differing := sum(a != b for a, b in zip(ids, others, strict=True)):
        wrong.append(f"{differing} of {len(texts)} strings have other ids")
    return _TRAINED.holds(not wrong, "; ".join(wrong[:3]), len(wrong), "at most 0")


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def _file(artefacts: Artefacts, stage: str, path: Path) -> Iterator[Result]:
    ids = Claim("tokenizer.ids", stage, "llama-server gives every text the trained ids")
    try:
        metadata = inspect(path).metadata
    except PipelineError as error:
        yield ids.not_run(f"the file cannot be read: {error}")
        return
    yield from _metadata(artefacts, stage, metadata)
    try:
        with LlamaServer(path, context=256, jinja=False) as server:
            yield from _same_ids(artefacts, ids, server)
            yield _adds(artefacts, stage, server)
    except PipelineError as error:
        yield ids.holds(False, f"llama-server cannot use it: {error}")
        return
    yield _ends(artefacts, stage, path)


def _metadata(artefacts: Artefacts, stage: str, metadata: dict[str, Any]) -> Iterator[Result]:
    """What the pinned converter writes for this tokenizer, key by key."""
    expected = artefacts.expected.metadata
    for id, (sentence, key) in _KEYS.items():
        ours, theirs = metadata.get(key), expected.get(key)
        yield Claim(id, stage, sentence).holds(ours == theirs, _key_difference(key, ours, theirs))
    wrong = []
    for name in _SPECIAL:
        key = f"tokenizer.ggml.{name}_token_id"
        if metadata.get(key) != expected.get(key) and key in expected:
            wrong.append(f"{name} is {metadata.get(key)} instead of {expected[key]}")
    tokenizer = artefacts.tokenizer
    for name, id in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if id is not None and metadata.get(f"tokenizer.ggml.{name}_token_id", id) != id:
            wrong.append(f"{name} is {metadata.get(f'tokenizer.ggml.{name}_token_id')}, the tokenizer's {id}")
    claim = Claim("tokenizer.special", stage, "BOS, EOS and the other special tokens are the trained ones")
    yield claim.holds(not wrong, "; ".join(wrong), len(wrong), "at most 0")


def _key_difference(key: str, ours: Any, theirs: Any) -> str:
    if isinstance(theirs, list) and not ours:
        return f"{key} is missing: {len(theirs):,} entries should be there"
    if isinstance(theirs, list) and isinstance(ours, list):
        if len(ours) != len(theirs):
            return f"{key} has {len(ours):,} entries instead of {len(theirs):,}"
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b) if ours != theirs else 0
        return f"{key}[{at}] is {ours[at]!r} instead of {theirs[at]!r}"
    return f"{key} is {ours!r} instead of {theirs!r}"


def _same_ids(artefacts: Artefacts, claim: Claim, server: LlamaServer) -> Iterator[Result]:
    tokenizer = artefacts.tokenizer
    rows = [decode(tokenizer, ids) for ids, _ in artefacts.held_out[1][:ROWS]] + _training_rows(artefacts)
    hostile = hostile_strings(artefacts.settings.strings, special_tokens=tokenizer.all_special_tokens)
    texts, own = [*dict.fromkeys(rows), *hostile], set(rows if artefacts.run else ())
    trained = _ids(tokenizer, texts)
    differing, words = 0, ""
    habits: Counter[str] = Counter()
    with progress(f"tokens of {claim.stage}", len(texts), "strings") as update:
        for number, (text, ids) in enumerate(zip(texts, trained, strict=True), 1):
            served = server.tokenize(text)
            if served == ids:
                pass
            elif text not in own and (habit := known_habit(server, tokenizer, text, served, add_special=False)):
                habits[habit] += 1
            else:
                differing += 1
                words = words or f"{text[:40]!r} is {served[:8]}, trained {ids[:8]}"
            if number % 100 == 0 or number == len(texts):
                update(number)
    more = f" ({differing:,} of {len(texts):,} strings differ)" if differing else ""
    yield claim.at_most(differing, artefacts.settings.differing_strings, words + more)
    if habits:
        known = "; ".join(f"{habit} ({count:,} strings)" for habit, count in habits.most_common(3))
        sentence = f"where hostile texts are served with other ids, llama.cpp is known for it: {known}"
        yield Claim("tokenizer.habits", claim.stage, sentence).holds(True, figure=habits.total(), threshold="explained")


def _training_rows(artefacts: Artefacts) -> list[str]:
    if artefacts.run is None or not (path := Layout(artefacts.run).tokens("train")).is_file():
        return []
    return [decode(artefacts.tokenizer, row["input_ids"]) for row in itertools.islice(read_tokens(path), ROWS)]


def _adds(artefacts: Artefacts, stage: str, server: LlamaServer) -> Result:
    """Whether the server puts a BOS in front of a text where training did, and nothing else around it."""
    text = "Hello"
    served, trained = server.tokenize(text, add_special=True), token_ids(artefacts.tokenizer, text)
    claim = Claim("tokenizer.bos", stage, "the server adds BOS where training did, and nothing else")
    return claim.holds(served == trained, f"{text!r} is served as {served}, trained as {trained}")


def _ends(artefacts: Artefacts, stage: str, path: Path) -> Result:
    """Whether llama.cpp stops at the token that ends a trained answer."""
    claim = Claim("tokenizer.end_of_turn", stage, "llama.cpp stops at the token that ends a trained answer")
    token = trained_end_of_turn(artefacts)
    if token is None:
        return claim.not_run("the chat template writes no token after an answer that could be found")
    with LlamaModel(path, context=16) as model:
        ends = model.ends_turn(token)
    return claim.holds(ends, f"it does not stop at token {token}, {decode(artefacts.tokenizer, [token])!r}", token)


def trained_end_of_turn(artefacts: Artefacts) -> int | None:
    """The id of the token that ends an answer: the last trained one of a row, else the one that the template writes.

    A row that was cut, or is a window of a text, ends in an ordinary token.
    """
    tokenizer, turns = artefacts.tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for ids, labels in artefacts.held_out[1]:
        trained = [id for id, label in zip(ids, labels, strict=False) if label != IGNORED]
        if trained and trained[-1] in tokenizer.added_tokens_decoder:
            return trained[-1]
    try:
        token = end_of_turn(tokenizer, render(tokenizer, turns))
    except PipelineError:
        return None
    return None if token is None else int(tokenizer.convert_tokens_to_ids(token))

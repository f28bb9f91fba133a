"""labels: on the batches that training really used, exactly the answers were trained, each to its end-of-turn token.

The batches were written down by the trainer itself. They are held against the conversations, rendered anew: not against
the labels that the data stage computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.console import progress
from pipeline.data.formats import Conversation
from pipeline.data.marks import ALL
from pipeline.data.sources import read_rows
from pipeline.prompt.labels import (
    IGNORED,
    decode,
    leading_bos,
    tokenize_prompt,
    tokenize_texts,
    training_texts,
)
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.run.layout import Layout
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result

_KNOWN = Claim("labels.known", "train", "every trained row is a conversation of the training data")
_SHARE = Claim("labels.share", "train", "a share of the tokens is trained")
_MASKED = Claim("labels.masked", "train", "no row is fully masked")
_SPANS = Claim("labels.spans", "train", "what is trained is the assistant's words, and nothing else")
_ENDS = Claim("labels.end_of_turn", "train", "every trained answer ends in the end-of-turn token")
_CUT = Claim("labels.cut", "train", "no answer is cut")
_PREFIX = Claim("labels.prefix", "train", "what stands before an answer is the prompt that a server sends")
_BOS = Claim("labels.bos", "train", "a row begins with as many BOS tokens as a served prompt")
CLAIMS = (_KNOWN, _SHARE, _MASKED, _SPANS, _ENDS, _CUT, _PREFIX, _BOS)


@dataclass
class Fault:
    """How many rows have it, and the first of them in words."""

    count: int = 0
    words: str = ""

    def add(self, words: str) -> None:
        """One more."""
        self.count += 1
        self.words = self.words or words


@dataclass
class Faults:
    unknown: Fault = field(default_factory=Fault)
    masked: Fault = field(default_factory=Fault)
    spans: Fault = field(default_factory=Fault)
    ends: Fault = field(default_factory=Fault)
    cut: Fault = field(default_factory=Fault)
    prefix: Fault = field(default_factory=Fault)
    bos: Fault = field(default_factory=Fault)


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge every row of train/batches.jsonl."""
    if artefacts.run is None or artefacts.adapter is None:
        yield from (claim.not_run("this export has no record of its training") for claim in CLAIMS)
        return
    path = Layout(artefacts.run).batches
    if artefacts.config is not None and artefacts.config.adapter.path is not None:
        why = "the adapter was trained elsewhere: the rows that it was trained on are not known here"
        yield from (claim.not_run(why) for claim in CLAIMS)
        return
    if not path.is_file():
        yield from (claim.not_run(f"{path} is missing") for claim in CLAIMS)
        return
    tokenizer = saved_tokenizer(artefacts.adapter)
    known = known_rows(tokenizer, Layout(artefacts.run).rows("train"))
    truncates = artefacts.config is not None and artefacts.config.data.on_overlong == "truncate"
    longest = artefacts.config.train.max_length if artefacts.config is not None and truncates else None
    faults = Faults()
    tokens = trained = rows = 0
    with progress("labels", path.read_bytes().count(b"\n"), "batches") as update:
        for number, batch in enumerate(read_rows(path), 1):
            for place, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
                tokens += len(ids)
                trained += sum(label != IGNORED for label in labels)
                rows += 1
                where = f"step {batch['step']}, row {place}"
                judge_row(tokenizer, ids, labels, known, f"{where}: ", faults, longest)
            update(number)

    yield _KNOWN.at_most(faults.unknown.count, 0, faults.unknown.words)
    share = trained / tokens if tokens else 0.0
    yield _SHARE.at_least(
        share, artefacts.settings.trained_share, f"{trained:,} of {tokens:,} tokens in {rows:,} rows are trained"
    )
    yield _MASKED.at_most(faults.masked.count, 0, faults.masked.words)
    yield _SPANS.at_most(faults.spans.count, 0, faults.spans.words)
    yield _ENDS.at_most(faults.ends.count, 0, faults.ends.words)
    yield _CUT.at_most(faults.cut.count, 0, faults.cut.words)
    yield _PREFIX.at_most(faults.prefix.count, 0, faults.prefix.words)
    yield _BOS.at_most(faults.bos.count, 0, faults.bos.words)


KnownRows = dict[tuple[int, ...], tuple[Conversation, int]]


def known_rows(tokenizer: Any, path: Path) -> KnownRows:
    """The ids of every training text, with its conversation and how many parts of it are trained."""
    owners, texts = [], []
    for row in read_rows(path):
        known = Conversation.from_row(row, "")
        for text in training_texts(tokenizer, known.messages, known.tools, known.trained):
            owners.append((known, len(text.spans)))
            texts.append(text)
    rows = tokenize_texts(tokenizer, texts)
    return {tuple(row.input_ids): owner for row, owner in zip(rows, owners, strict=True)}


def judge_row(
    tokenizer: Any,
    ids: list[int],
    labels: list[int],
    known: KnownRows,
    where: str,
    faults: Faults,
    longest: int | None,
) -> None:
    """Add what is wrong with one row; `longest` tokens are kept of one where that was asked for."""
    spans = [
        (group[0][0], group[-1][0] + 1)
        for trained, pairs in itertools.groupby(enumerate(labels), key=lambda pair: pair[1] != IGNORED)
        if trained and (group := list(pairs))
    ]
    # A second BOS makes a row that is in no data; it must not hide behind that.
    expected_bos = 0
    count = leading_bos(tokenizer, ids)
    owner = known.get(tuple(ids))
    cut = False
    if owner is None and count > 1 and (owner := known.get(tuple(ids[count - 1 :]))) is not None:
        expected_bos = 1
    elif owner is None:
        owner = next((of for text, of in known.items() if text[: len(ids)] == tuple(ids)), None)
        cut = owner is not None
    if owner is None:
        faults.unknown.add(f"{where}{decode(tokenizer, ids[:60])!r} is none of the conversations")
        return
    row, trained_answers = owner
    messages, tools = row.messages, row.tools
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
    prompts = {index: tokenize_prompt(tokenizer, messages[:index], tools) for index in answers}
    expected_bos = expected_bos or leading_bos(tokenizer, prompts[answers[-1]])
    if count != expected_bos:
        faults.bos.add(f"{where}begins with {count} BOS tokens, a served prompt with {expected_bos}")
        return
    if not spans:
        faults.masked.add(f"{where}no token is trained: {decode(tokenizer, ids[:60])!r}")
        return
    if cut and len(ids) == longest:  # as it was to be: its last answer has no end to judge
        return
    if cut:
        faults.cut.add(f"{where}ends after {len(ids)} tokens, in the middle: {decode(tokenizer, ids[-12:])!r}")
        return
    if row.trained == ALL:  # the end-of-turn token may be followed by white space, which nobody waits for
        written = decode(tokenizer, ids[spans[0][1] :]).strip()
        if len(spans) > 1 or ids[count : spans[0][1]] != labels[count : spans[0][1]] or written:
            faults.spans.add(f"{where}a token is not trained: {decode(tokenizer, ids[:60])!r}")
        return
    for start, end in spans:
        index = next((i for i in answers if _served(tokenizer, prompts[i], ids[:start])), None)
        text = decode(tokenizer, ids[start:end])
        if ids[start:end] != labels[start:end]:
            faults.spans.add(f"{where}the labels are not the tokens at their places, from token {start}")
            return
        if index is None:
            faults.prefix.add(
                f"{where}before {text[:40]!r} stands {decode(tokenizer, ids[max(0, start - 12) : start])!r}, "
                "where a server would begin the answer elsewhere"
            )
            return
        last = decode(tokenizer, ids[end - 1 : end])
        if ids[end - 1] not in tokenizer.added_tokens_decoder:
            faults.ends.add(f"{where}the trained answer {text[-60:]!r} ends in {last!r}")
            return
        content = messages[index].get("content")
        # A template may write an answer's thinking its own way, and calls of tools after what is said.
        if isinstance(content, str) and content.rpartition("</think>")[2].strip() not in text:
            faults.spans.add(f"{where}{text[:80]!r} is trained, the answer is {content[:80]!r}")
            return
    if len(spans) < trained_answers:
        faults.masked.add(f"{where}{len(spans)} of {trained_answers} answers are trained: {decode(tokenizer, ids)!r}")


def _served(tokenizer: Any, prompt: list[int], before: list[int]) -> bool:
    """Whether a row's tokens before an answer are the served prompt.

    One more is allowed: where the tokenizer joins the prompt's end with the answer's beginning, that token is not
    trained.
    """
    if before[: len(prompt)] == prompt:
        return len(before) <= len(prompt) + 1
    return len(before) == len(prompt) and decode(tokenizer, before).startswith(decode(tokenizer, prompt))

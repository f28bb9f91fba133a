"""labels: on the batches that training really used, exactly the answers were trained, each to its end-of-turn token.

The batches were written down by the trainer itself. They are held against the conversations, rendered anew: not against
the labels that the data stage computed. Of every conversation a digest stays in memory, and where it stands.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.console import progress
from pipeline.data.formats import Conversation
from pipeline.data.marks import ALL
from pipeline.data.sources import parse_json, read_rows
from pipeline.prompt.labels import (
    IGNORED,
    decode,
    leading_bos,
    tokenize_prompt,
    tokenize_texts,
    training_texts,
)
from pipeline.prompt.template import token_ids
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.prompt.whole_texts import tokenize_whole_texts
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result
from pipeline.verify.training import Training, trainings_of

_KNOWN = Claim("labels.known", "train", "every trained row is a conversation of the training data")
_SHARE = Claim("labels.share", "train", "a share of the tokens is trained")
_MASKED = Claim("labels.masked", "train", "no row is fully masked")
_SPANS = Claim("labels.spans", "train", "what is trained is the assistant's words, or a whole text, and nothing else")
_ENDS = Claim(
    "labels.end_of_turn", "train", "every trained answer ends in the end-of-turn token, every text in the end token"
)
_CUT = Claim("labels.cut", "train", "no answer is cut")
_PREFIX = Claim("labels.prefix", "train", "what stands before an answer is the prompt that a server sends")
_BOS = Claim("labels.bos", "train", "a row begins with as many BOS tokens as a served prompt")
CLAIMS = (_KNOWN, _SHARE, _MASKED, _SPANS, _ENDS, _CUT, _PREFIX, _BOS)


_BATCH = 1000  # rows that are tokenized at a time
_LOOKED_FOR = 100  # sequences without an owner that are looked for in all rows
_WINDOW = 2048  # of a text, in tokens, where no configuration is known


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


@dataclass
class Judged:
    """What was found in the batches of one training, or of all of them.

    Attributes:
        rows, tokens, trained: how many rows were judged, the tokens in them, and how many of these are trained.
        faults: what is wrong with them.
    """

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    faults: Faults = field(default_factory=Faults)


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge every row that was trained on, by the batches that training wrote down."""
    trainings = trainings_of(artefacts)
    if isinstance(trainings, str):
        yield from (claim.not_run(trainings) for claim in CLAIMS)
        return
    found = Judged()
    for training in trainings:
        _judge(training, found, f"{training.layout.run.name}: " if len(trainings) > 1 else "")
    faults = found.faults
    yield _KNOWN.at_most(faults.unknown.count, 0, faults.unknown.words)
    share = found.trained / found.tokens if found.tokens else 0.0
    words = f"{found.trained:,} of {found.tokens:,} tokens in {found.rows:,} rows are trained"
    yield _SHARE.at_least(share, artefacts.settings.trained_share, words)
    yield _MASKED.at_most(faults.masked.count, 0, faults.masked.words)
    yield _SPANS.at_most(faults.spans.count, 0, faults.spans.words)
    yield _ENDS.at_most(faults.ends.count, 0, faults.ends.words)
    yield _CUT.at_most(faults.cut.count, 0, faults.cut.words)
    yield _PREFIX.at_most(faults.prefix.count, 0, faults.prefix.words)
    yield _BOS.at_most(faults.bos.count, 0, faults.bos.words)


def _judge(training: Training, found: Judged, place_of: str) -> None:
    """Add what one training's batches show; its places begin with `place_of`."""
    path, config = training.layout.batches, training.config
    tokenizer = saved_tokenizer(training.adapter)
    truncates = config is not None and config.data.on_overlong == "truncate"
    longest = config.train.max_length if config is not None and truncates else None
    window = (config.data.window or config.train.max_length) if config is not None else None
    known = KnownRows(tokenizer, training.layout.rows("train"), window, longest)
    with path.open("rb") as file:
        batches = sum(1 for _ in file)
    with progress("labels", batches, "batches") as update:
        for number, batch in enumerate(read_rows(path), 1):
            for place, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
                found.tokens += len(ids)
                found.trained += sum(label != IGNORED for label in labels)
                found.rows += 1
                where = f"{place_of}step {batch['step']}, row {place}: "
                judge_row(tokenizer, ids, labels, known.owner_of(ids), where, found.faults, longest)
            update(number)


@dataclass(frozen=True)
class Owner:
    """What a trained sequence was made of.

    Attributes:
        row: the row.
        answers: how many answers of it are trained in the sequence.
        part: which of the row's sequences it is, counted from the end: 1 is the last.
        cut: the sequence is a beginning of it.
        more_bos: BOS tokens that the sequence has beyond it.
    """

    row: Conversation
    answers: int = 1
    part: int = 1
    cut: bool = False
    more_bos: int = 0


class KnownRows:
    """The rows of a set, found by the ids that are trained of them.

    Args:
        tokenizer: the one that was trained.
        path: the rows, JSON lines.
        window: the longest sequence of a whole text, in tokens.
        longest: the length to which sequences were cut; None for no cut.
    """

    def __init__(self, tokenizer: Any, path: Path, window: int | None = None, longest: int | None = None) -> None:
        self._tokenizer, self._path, self._window, self._longest = tokenizer, path, window or _WINDOW, longest
        self._places: dict[bytes, int] = {}
        self._unowned = 0
        for at, rows in _batches(path):
            for place, sequences in zip(at, self._sequences(rows), strict=True):
                for ids, _ in sequences:
                    self._places.setdefault(_digest(ids[:longest]), place)

    def owner_of(self, ids: Sequence[int]) -> Owner | None:
        """The row that a sequence was made of, also where it has more BOS than that or is a beginning of it."""
        count = leading_bos(self._tokenizer, ids)
        for more in range(2) if count > 1 else range(1):
            whole = list(ids[count - 1 :] if more else ids)
            place = self._places.get(_digest(whole))
            if place is not None:
                return self._owner(place, whole, count - 1 if more else 0)
        return self._begun_with(list(ids))

    def _owner(self, place: int, ids: list[int], more_bos: int) -> Owner | None:
        with self._path.open("rb") as file:
            file.seek(place)
            row = _row(file.readline())
        (sequences,) = self._sequences([row])
        for part, (whole, answers) in enumerate(sequences):
            if whole[: len(ids)] == ids:
                return Owner(row, answers, len(sequences) - part, len(whole) > len(ids), more_bos)
        return None

    def _begun_with(self, ids: list[int]) -> Owner | None:
        """Looks through all rows: no right training comes here."""
        if self._unowned == _LOOKED_FOR:
            return None
        self._unowned += 1
        for at, rows in _batches(self._path):
            for place, sequences in zip(at, self._sequences(rows), strict=True):
                if any(whole[: len(ids)] == ids for whole, _ in sequences):
                    return self._owner(place, ids, 0)
        return None

    def _sequences(self, rows: Sequence[Conversation]) -> list[list[tuple[list[int], int]]]:
        """The ids of each row's sequences, and how many answers are trained in each."""
        texts = [
            [] if row.text is not None else training_texts(self._tokenizer, row.messages, row.tools, row.trained)
            for row in rows
        ]
        tokenized = iter(tokenize_texts(self._tokenizer, [text for of_row in texts for text in of_row]))
        found = [[(next(tokenized).input_ids, len(text.spans)) for text in of_row] for of_row in texts]
        whole = [row.text for row in rows if row.text is not None]
        windows = iter(tokenize_whole_texts(self._tokenizer, whole, self._window) if whole else [])
        for row, sequences in zip(rows, found, strict=True):
            if row.text is not None:
                sequences += [(window.input_ids, 1) for window in next(windows)]
        return found


def _batches(path: Path) -> Iterator[tuple[list[int], list[Conversation]]]:
    """Rows of a file, a few at a time, with the bytes at which they begin."""
    with path.open("rb") as file:
        at, end = 0, 0
        while lines := list(itertools.islice(file, _BATCH)):
            places = []
            for line in lines:
                at, end = end, end + len(line)
                places.append(at)
            yield places, list(map(_row, lines))


def _row(line: bytes) -> Conversation:
    return Conversation.from_row(parse_json(line.decode(), "train.jsonl"), "")


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("i", ids).tobytes(), digest_size=16).digest()


def judge_row(
    tokenizer: Any,
    ids: list[int],
    labels: list[int],
    owner: Owner | None,
    where: str,
    faults: Faults,
    longest: int | None,
) -> None:
    """Add what is wrong with one sequence.

    Args:
        tokenizer: the one that was trained.
        ids, labels: the sequence.
        owner: what it was made of.
        where: its place, for the words.
        faults: takes what is wrong.
        longest: the length to which sequences were to be cut; None for no cut.
    """
    if owner is None:
        faults.unknown.add(f"{where}{decode(tokenizer, ids[:60])!r} is none of the conversations")
        return
    if owner.row.text is not None:
        _judge_text(tokenizer, ids, labels, owner, where, faults)
        return
    spans = [
        (group[0][0], group[-1][0] + 1)
        for trained, pairs in itertools.groupby(enumerate(labels), key=lambda pair: pair[1] != IGNORED)
        if trained and (group := list(pairs))
    ]
    count = leading_bos(tokenizer, ids)
    row, cut = owner.row, owner.cut
    messages, tools = row.messages, row.tools
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
    prompts = {index: tokenize_prompt(tokenizer, messages[:index], tools) for index in answers}
    expected_bos = 1 if owner.more_bos else leading_bos(tokenizer, prompts[answers[-1]])
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
    if len(spans) < owner.answers:
        faults.masked.add(f"{where}{len(spans)} of {owner.answers} answers are trained: {decode(tokenizer, ids)!r}")


def _judge_text(tokenizer: Any, ids: list[int], labels: list[int], owner: Owner, where: str, faults: Faults) -> None:
    """A window of a whole text: all of it is trained, but for BOS and what an earlier window trains."""
    count, shown = leading_bos(tokenizer, ids), repr(decode(tokenizer, ids[:60]))
    if owner.more_bos:
        faults.bos.add(f"{where}begins with {count} BOS tokens, a served text with {count - owner.more_bos}")
    elif owner.cut:
        faults.cut.add(f"{where}ends after {len(ids)} tokens, in the middle: {decode(tokenizer, ids[-12:])!r}")
    elif all(label == IGNORED for label in labels):
        faults.masked.add(f"{where}no token is trained: {shown}")
    elif owner.part == 1 and ids[-1] != tokenizer.eos_token_id:
        faults.ends.add(f"{where}the text ends in {decode(tokenizer, ids[-1:])!r}")
    elif owner.part == 1 and labels[-1] == IGNORED:
        faults.ends.add(f"{where}the end token is not trained: {shown}")
    else:
        served = token_ids(tokenizer, owner.row.text or "")
        first = ids[: len(served)] == served[: len(ids)]
        opening = leading_bos(tokenizer, served) if first else leading_bos(tokenizer, token_ids(tokenizer, "a")) + 1
        if labels[opening:] != ids[opening:]:
            faults.spans.add(f"{where}a token of a whole text is not trained: {shown}")
        elif not first and any(label != IGNORED for label in labels[:opening]):
            faults.spans.add(f"{where}a token that an earlier window trains is trained again: {shown}")


def _served(tokenizer: Any, prompt: list[int], before: list[int]) -> bool:
    """Whether a row's tokens before an answer are the served prompt.

    One more is allowed: where the tokenizer joins the prompt's end with the answer's beginning, that token is not
    trained.
    """
    if before[: len(prompt)] == prompt:
        return len(before) <= len(prompt) + 1
    return len(before) == len(prompt) and decode(tokenizer, before).startswith(decode(tokenizer, prompt))

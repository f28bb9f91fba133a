"""From rows to sequences that are trained: rendered, checked for what the template leaves out, tokenized, and
held to the longest length. What is done with a row, or wrong with it, comes back with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.findings import RowError
from pipeline.data.formats import Conversation
from pipeline.errors import UserError
from pipeline.prompt.control_tokens import control_tokens_in
from pipeline.prompt.labels import Tokenized, TrainingText, tokenize_texts, training_texts
from pipeline.prompt.left_out import left_out
from pipeline.prompt.lengths import fit, pieces
from pipeline.prompt.served_ids import refuse_other_ids
from pipeline.prompt.tokenizer import Beyond
from pipeline.prompt.whole_texts import tokenize_whole_texts

# Kinds of findings.
TOO_LONG_DROPPED, TOO_LONG_CUT, TOO_LONG_SPLIT = "too long and left out", "too long and cut", "too long and split"


@dataclass
class Outcome:
    """What became of a row.

    Attributes:
        row: as it was given.
        kept: what is trained of it: conversations, each with its sequences. Empty where nothing is.
        error: why it cannot be used, if it cannot.
        notes: what was found or done, as (kind, words).
    """

    row: Conversation
    kept: list[tuple[Conversation, list[Tokenized]]] = field(default_factory=list)
    error: UserError | None = None
    notes: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Encoder:
    """Makes sequences of conversations.

    Attributes:
        tokenizer: the one that is trained with.
        beyond: tokens that the base has no embedding of.
        max_length: of a sequence, in tokens.
        on_overlong: what is done with a longer one.
        window: of a whole text, in tokens; None for max_length.
        control_tokens: "error" or "keep": what is done with a text that holds control tokens.
        unwritten: "error" or "keep": what is done with a row of which the template leaves out a part.
    """

    tokenizer: Any
    beyond: Beyond
    max_length: int
    on_overlong: str = "error"
    window: int | None = None
    control_tokens: str = "error"
    unwritten: str = "error"

    def encode(self, rows: Sequence[Conversation]) -> list[Outcome]:
        """The outcomes of rows, in their order; all are tokenized in one call."""
        outcomes = [Outcome(row) for row in rows]
        self._encode_texts([outcome for outcome in outcomes if outcome.row.text is not None])
        texts = [[] if outcome.row.text is not None else self._rendered(outcome) for outcome in outcomes]
        tokenized = iter(tokenize_texts(self.tokenizer, [text for of_row in texts for text in of_row]))
        for outcome, of_row in zip(outcomes, texts, strict=True):
            sequences = [next(tokenized) for _ in of_row]
            if outcome.error is None and outcome.row.text is None:
                try:
                    self._fit(outcome, sequences)
                except UserError as error:
                    outcome.error, outcome.kept = error, []
        return outcomes

    def _encode_texts(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            try:
                self._check_texts(outcome)
            except UserError as error:
                outcome.error = error
        good = [outcome for outcome in outcomes if outcome.error is None]
        texts = [outcome.row.text or "" for outcome in good]
        sequences = tokenize_whole_texts(self.tokenizer, texts, self.window or self.max_length)
        for outcome, of_text in zip(good, sequences, strict=True):
            outcome.kept = [(outcome.row, of_text)]

    def _rendered(self, outcome: Outcome) -> list[TrainingText]:
        row = outcome.row
        try:
            self._check_texts(outcome)
            texts = training_texts(self.tokenizer, row.messages, row.tools, row.trained)
            refuse_other_ids(self.tokenizer, (text.text for text in texts), row.place)
            for kind, part in left_out(row, texts):
                words = f"{row.place}: the model's chat template writes nothing of {part}"
                if self.unwritten == "error":
                    raise RowError(
                        f"{kind} that the template leaves out",
                        f"{words}, so it would not be trained: take a base or a model.chat_template that knows "
                        f'{kind}, leave it out of the data, or set data.unwritten = "keep"',
                    )
                outcome.notes.append((f"{kind} that the template leaves out", words))
        except UserError as error:
            known = isinstance(error, RowError)
            outcome.error = error if known else RowError("the template cannot train it", f"{row.place}: {error}")
            return []
        return texts

    def _check_texts(self, outcome: Outcome) -> None:
        row = outcome.row
        refuse_other_ids(self.tokenizer, [row.text or ""], row.place)
        if self.beyond.tokens:
            said = (str(value) for message in row.messages for value in message.values())
            try:
                self.beyond.refuse_in("\n".join((*said, str(row.tools), row.text or "")), row.place)
            except UserError as error:
                raise RowError("a token without an embedding", str(error)) from None
        for where, token in control_tokens_in(self.tokenizer, row):
            words = f"{row.place}: {where} holds {token!r}, which is a control token of the model"
            if self.control_tokens == "error":
                raise RowError(
                    f"the control token {token}",
                    f"{words}: it may end the turn, or begin another; take it out of the text, or set "
                    'data.control_tokens = "keep" to train it as that token',
                )
            outcome.notes.append((f"the control token {token}", words))

    def _fit(self, outcome: Outcome, sequences: list[Tokenized]) -> None:
        row = outcome.row
        if self.on_overlong == "split" and any(len(one.input_ids) > self.max_length for one in sequences):
            parts = pieces(row, self._fits)
            outcome.kept = [(part, self._fitting(outcome, self._sequences(part))) for part in parts]
            if len(parts) > 1:
                outcome.notes.append((TOO_LONG_SPLIT, f"{row.place}: is trained in {len(parts):,} pieces"))
        elif fitting := self._fitting(outcome, sequences):
            outcome.kept = [(row, fitting)]

    def _fitting(self, outcome: Outcome, sequences: list[Tokenized]) -> list[Tokenized]:
        kept = []
        for sequence in sequences:
            length = f"{outcome.row.place}: has {len(sequence.input_ids):,} tokens"
            fitting = fit(sequence, self.max_length, self.on_overlong, outcome.row.place)
            if fitting is None:
                outcome.notes.append((TOO_LONG_DROPPED, f"{length} and was left out"))
                continue
            if fitting is not sequence:
                outcome.notes.append((TOO_LONG_CUT, f"{length}; what follows the first {self.max_length:,} was cut"))
            kept.append(fitting)
        return kept

    def _sequences(self, row: Conversation) -> list[Tokenized]:
        return tokenize_texts(self.tokenizer, training_texts(self.tokenizer, row.messages, row.tools, row.trained))

    def _fits(self, row: Conversation) -> bool:
        return row.trained == () or all(len(one.input_ids) <= self.max_length for one in self._sequences(row))

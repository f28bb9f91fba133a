"""Expected answers as drafts: one forward pass finds those that a model would write anyway.

Greedy decoding writes, token by token, what the model thinks the likeliest. Where each token of a draft is the
likeliest after those before it, the end-of-turn token included, decoding would have written the draft; only the other
answers have to be decoded. It is the test of speculative decoding (Y. Leviathan et al., 2023, section 2.3) at
temperature 0, and saves most of the time of asking a model that has learned its lesson.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.prompt.labels import IGNORED, tokenize_conversation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Draft:
    """A question with its expected answer as token ids; the answer begins at `start` and ends with the turn's end."""

    ids: list[int]
    start: int

    @property
    def answer(self) -> list[int]:
        """The answer's tokens."""
        return self.ids[self.start :]

    def ends_in(self, stop: Sequence[int], limit: int) -> bool:
        """Whether decoding would stop where the draft does: at one of these tokens, within so many."""
        return len(self.answer) <= limit and self.answer[-1] in stop


def draft(tokenizer: Any, question: Sequence[dict[str, Any]], answer: str) -> Draft | None:
    """Tokenize a question and its answer as they are trained.

    Args:
        tokenizer: with the chat template.
        question: messages up to where the assistant speaks.
        answer: what it is expected to say.

    Returns:
        None where the template cannot be trained on this conversation: it can still be asked.
    """
    try:
        row = tokenize_conversation(tokenizer, [*question, {"role": "assistant", "content": answer}])
    except UserError:
        return None
    end = max(place for place, label in enumerate(row.labels) if label != IGNORED) + 1
    start = end
    while start and row.labels[start - 1] != IGNORED:
        start -= 1
    return Draft(row.input_ids[:end], start)


def would_be_written(draft: Draft, logits: NDArray[np.float32]) -> bool:
    """Whether greedy decoding writes the draft.

    Args:
        draft: the question and the answer.
        logits: after each of its tokens, [len(ids), vocabulary].
    """
    likeliest = logits[draft.start - 1 : len(draft.ids) - 1].argmax(-1)
    return bool((likeliest == draft.answer).all())

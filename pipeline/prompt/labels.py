"""Which tokens are trained: what the model has to write itself, and nothing that the server writes for it.

It stands on the prefix property. The server sends the conversation before an answer, rendered with the
generation prompt. If that text is a prefix of the training text, then what follows it, up to and with the
end-of-turn token, is exactly what the model has to produce. A template that breaks the property would be
trained on a prompt that it will never see; it is refused.

Two kinds of template are met on their own terms. Some put an empty, closed thinking block into the prompt and
leave it out of a finished answer: the training text is then the prompt and the answer joined. And templates
that rewrite history (an earlier answer loses its thinking, or ends in another token) keep the property for
the last answer only. Such a conversation becomes several training texts, each ending in an answer as it was
first given.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.marks import ALL, Trained
from pipeline.errors import PipelineError, UserError
from pipeline.prompt.template import end_of_turn, ids_of, render, token_ids, whole_tokens, with_bos
from pipeline.prompt.token_places import Located, locate

# What a prompt ends with when thinking is switched off: a block that is opened and closed again.
EMPTY_THOUGHT = re.compile(r"(<think>\s*</think>|<\|channel>thought\s*<channel\|>)\s*\Z")
IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class TrainingText:
    """A rendered conversation. `spans` are (first, past the last) character of each part that is trained."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tokenized:
    """A sequence to train on.

    Attributes:
        input_ids: token ids; at most one BOS in front, unless the template itself writes more.
        labels: the same ids where the loss is taken, IGNORED elsewhere.
        merged: answers whose first characters became one token with the end of the prompt. The server sends
            the prompt without them, so that token is not trained.
    """

    input_ids: list[int]
    labels: list[int]
    merged: int = 0

    @property
    def trained(self) -> int:
        """The number of tokens that are trained."""
        return len(self.labels) - self.labels.count(IGNORED)


def tokenize_conversation(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
) -> Tokenized:
    """Token ids and labels of a conversation up to its last answer.

    Where the template rewrites history, only the answers that it leaves as they were are labelled; see
    `training_texts`.

    Raises:
        UserError: the template refuses the conversation, or cannot be trained faithfully.
    """
    return tokenize_texts(tokenizer, training_texts(tokenizer, messages, tools)[:1])[0]


def tokenize_prompt(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
) -> list[int]:
    """Token ids of what a server sends so that the model answers these messages."""
    return token_ids(tokenizer, render(tokenizer, messages, add_generation_prompt=True, tools=tools))


def training_texts(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    trained: Trained = None,
) -> list[TrainingText]:
    """The texts in which every answer of a conversation is trained once.

    Args:
        tokenizer: with a chat template.
        messages: the conversation, up to its last trained answer.
        tools: JSON schemas of the tools on offer.
        trained: the places of the messages that are trained; None for every answer, "all" for every token.

    Returns:
        One text for most templates. For one that rewrites history the whole conversation first, then the
        beginnings of it that end in the other answers. An answer that opens the conversation is not trained:
        nobody asks for it.

    Raises:
        UserError: the template refuses the conversation, breaks the prefix property, or writes no end-of-turn
            token.
    """
    if trained == ALL:
        text = _turn(tokenizer, messages, tools).text
        return [TrainingText(text, ((0, len(text.rstrip())),))]
    left = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index > 0 and (trained is None or index in trained)
    ]
    if not left:
        raise UserError("the conversation has no assistant turn after a question, so there is nothing to train")
    turns = {index: _turn(tokenizer, messages[: index + 1], tools) for index in left}
    texts = []
    while left:
        whole = turns[left[-1]].text
        covered = [index for index in left if whole.startswith(turns[index].text[: turns[index].end])]
        texts.append(TrainingText(whole, tuple((turns[index].start, turns[index].end) for index in covered)))
        left = [index for index in left if index not in covered]
    return texts


@dataclass(frozen=True)
class _Turn:
    text: str  # the conversation up to and with an answer
    start: int  # where the answer begins
    end: int  # where its end-of-turn token ends


def _turn(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> _Turn:
    prompt = render(tokenizer, messages[:-1], add_generation_prompt=True, tools=tools)
    text = render(tokenizer, messages, tools=tools)
    if not text.startswith(prompt):
        without = EMPTY_THOUGHT.sub("", prompt)
        if without == prompt or not text.startswith(without):
            raise UserError(_not_what_is_served(prompt, text))
        text = prompt + text[len(without) :]
    if end_of_turn(tokenizer, text) is None:
        raise UserError(
            f"the model's chat template ends an answer with {text[-20:]!r}, which is no end-of-turn token: "
            "the model would never learn to stop. Take a chat template that writes one after each answer, "
            "e.g. eos_token"
        )
    return _Turn(text, len(prompt), len(text.rstrip()))


def _not_what_is_served(prompt: str, text: str) -> str:
    same = len(os.path.commonprefix([prompt, text]))
    served, trained = prompt[max(0, same - 20) : same + 40], text[max(0, same - 20) : same + 40]
    thinking = "think" in prompt[same - 20 :].lower() or "thought" in prompt[same - 20 :].lower()
    remedy = 'give the answers their "reasoning_content", or take' if thinking else "take"
    return (
        f"the model's chat template does not train what it serves: the prompt has {served!r} where the "
        f"training text has {trained!r}; {remedy} another chat template"
    )


def tokenize_texts(tokenizer: Any, texts: Sequence[TrainingText]) -> list[Tokenized]:
    """Token ids and labels of many texts.

    Raises:
        UserError: the tokenizer cannot say where its tokens lie in the text.
        PipelineError: the end-of-turn token was not kept whole.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} does not tell where a token lies in the text: the base needs a tokenizer.json"
        )
    places = locate(tokenizer, [text.text for text in texts])
    tails = [one.tail(start) for one, text in zip(places, texts, strict=True) for start, _ in text.spans]
    different = list(dict.fromkeys(tail for _, tail in tails))  # most rows have the same: how an answer begins
    ids_of_tail = dict(zip(different, ids_of(tokenizer, different), strict=True))
    prompts = ((place, ids_of_tail[tail]) for place, tail in tails)
    return [
        _labelled(tokenizer, text, one, itertools.islice(prompts, len(text.spans)))
        for text, one in zip(texts, places, strict=True)
    ]


def _labelled(
    tokenizer: Any, text: TrainingText, located: Located, prompts: Iterable[tuple[int, list[int]]]
) -> Tokenized:
    ids = located.ids
    labels = [IGNORED] * len(ids)
    merged = 0
    for (start, end), (place, tail) in zip(text.spans, prompts, strict=True):
        first = place + len(tail)
        if ids[place:first] != tail:  # the tokenizer joined the prompt's last character with the answer's first
            merged += 1
            first = located.beginning(start)
        last = located.ending(end)
        token = tokenizer.convert_ids_to_tokens(ids[last])
        if not text.text[:end].endswith(token) or token not in whole_tokens(tokenizer):
            raise PipelineError(f"the tokenizer ends an answer in {token!r}, not in one end-of-turn token")
        labels[first : last + 1] = ids[first : last + 1]
    whole = with_bos(tokenizer, ids)
    return Tokenized(whole, [IGNORED] * (len(whole) - len(ids)) + labels, merged)


def trained_parts(tokenizer: Any, row: Tokenized) -> list[str]:
    """The trained tokens as text, one string for each run of them."""
    parts = itertools.groupby(zip(row.input_ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [decode(tokenizer, [token for token, _ in pairs]) for trained, pairs in parts if trained]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included, nothing tidied."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def leading_bos(tokenizer: Any, ids: Sequence[int]) -> int:
    """How many BOS tokens stand at the front. Two or more are a mistake that training and serving can differ
    in."""
    bos = tokenizer.bos_token_id
    return next((count for count, token in enumerate(ids) if token != bos), len(ids))

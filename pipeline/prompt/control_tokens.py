"""Control tokens inside the texts of a row: to the model `<|im_end|>` in a question ends the turn, whoever wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pipeline.data.formats import Conversation

# Where one of these is a word of a vocabulary, llama.cpp ends answers at it and makes it a control token, whatever the
# file says (src/llama-vocab.cpp, special_eog_ids).
CONTROL_WORDS = frozenset(
    {
        "</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<end_of_turn>", "<end_of_utterance>", "<turn|>",
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|return|>",
        "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    }
)  # fmt: skip
# What llama.cpp's converter takes for a control token by its looks (conversion/base.py, does_token_look_special).
_LOOKS = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)


def looks_like_control(token: str) -> bool:
    """Whether llama.cpp makes a token a control token, whatever the tokenizer's files say of it."""
    return token in CONTROL_WORDS or _LOOKS.fullmatch(token) is not None


def control_tokens_in(tokenizer: Any, row: Conversation) -> Iterator[tuple[str, str]]:
    """The control tokens that stand in a row's texts.

    Yields:
        Which message it is, "message 1", or "the text", and the token's text.
    """
    if (found := _pattern(tokenizer)) is None:
        return
    for token in found.findall(row.text or ""):
        yield "the text", token
    for number, message in enumerate(row.messages, 1):
        for value in message.values():
            for token in found.findall(value if isinstance(value, str) else str(value)):
                yield f"message {number}", token


@lru_cache(maxsize=8)
def _pattern(tokenizer: Any) -> re.Pattern[str] | None:
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    words = sorted(
        (token for token in tokens if token.strip()), key=len, reverse=True
    )  # the longest match is the token
    return re.compile("|".join(map(re.escape, words))) if words else None

"""What llama.cpp's tokenizers are known to do otherwise than the ones that models were trained with.

Each habit is proven on the text itself before it is named: what the trained tokenizer would make of the text as
llama.cpp reads it must be, id for id, what llama.cpp makes of it.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.prompt.template import with_bos


def known_habit(
    server: LlamaServer,
    tokenizer: Any,
    trained: str,
    prompt: str,
    expected: list[int],
    served: list[int],
    *,
    add_special: bool = True,
) -> str:
    """Which habit of llama.cpp's tokenizer explains other ids completely; "" if none does.

    Args:
        server: has the served vocabulary.
        tokenizer: the trained one, of transformers.
        trained: the text as it was trained.
        prompt: the text as it is served, without a BOS that the server adds.
        expected: the trained ids of `trained`.
        served: the served ids of `prompt`.
        add_special: BOS is added to `prompt`.
    """
    for form in (None, "NFC", "NFKC"):
        normal = unicodedata.normalize(form, prompt) if form else prompt
        if form and normal == prompt:
            continue
        ids = server.tokenize(normal, add_special=add_special, parse_special=True) if form else served
        reasons = [f"the trained tokenizer normalises texts ({form}), llama.cpp does not"] if form else []
        if ids == expected:
            return reasons[0]
        # Words such as </s> are special to llama.cpp in any vocabulary that has them.
        pieces = {tokenizer.convert_ids_to_tokens(token): token for token in set(ids) - set(expected)}
        words = sorted(
            piece
            for piece, token in pieces.items()
            if piece in trained and server.tokenize(piece, parse_special=False) != [token]
        )
        split = _split(tokenizer, trained, {word: pieces[word] for word in words})
        if words and (with_bos(tokenizer, split) if add_special else split) == ids:
            read = f"llama.cpp reads {', '.join(words)} in a text as a special token, the trained tokenizer does not"
            return "; ".join([*reasons, read])
    return ""


def _split(tokenizer: Any, text: str, special: dict[str, int]) -> list[int]:
    """The trained tokenizer's ids of a text in which some words are special tokens."""
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        ids += [special[part]] if part in special else tokenizer(part, add_special_tokens=False).input_ids
    return ids

"""What llama.cpp's tokenizers are known to do otherwise than the ones that models were trained with.

Each habit is proven on the text itself before it is named: what the trained tokenizer would make of the text as
llama.cpp reads it must be, id for id, what llama.cpp makes of it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from pipeline.llamacpp.library import LlamaModel
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.prompt.served_ids import split_as_served
from pipeline.prompt.template import with_bos
from pipeline.prompt.token_white_space import left, parts
from pipeline.prompt.tokenizer import as_served


def known_habit(
    server: LlamaServer | LlamaModel, tokenizer: Any, trained: str, served: list[int], *, add_special: bool = True
) -> str:
    """Which habits of llama.cpp's tokenizer explain other ids completely; "" if none do.

    Args:
        server: has the served vocabulary.
        tokenizer: the trained one, of transformers.
        trained: the text as it was trained.
        served: the served ids of it.
        add_special: they begin with BOS, where the tokenizer adds it.
    """
    twin, habits = _as_served(tokenizer)
    if left(twin, trained):
        habits = [*habits, "of the white space after a special token only that of ASCII is taken"]
    ids = [id for part in parts(twin, trained) for id in _ids(twin, part)]
    if _whole(twin, ids, add_special) != served:
        # Further words may be special to llama.cpp in any vocabulary that has them.
        pieces = {tokenizer.convert_ids_to_tokens(token): token for token in set(served) - set(ids)}
        words = sorted(
            piece
            for piece, token in pieces.items()
            if piece in trained and server.tokenize(piece, parse_special=False) != [token]
        )
        split = _split(twin, trained, {word: pieces[word] for word in words})
        if not words or _whole(twin, split, add_special) != served:
            return ""
        habits = [*habits, f"special tokens in a text: {', '.join(words)}"]
    return f"llama.cpp reads otherwise than the trained tokenizer: {'; '.join(habits)}"


@lru_cache(maxsize=8)
def _as_served(tokenizer: Any) -> tuple[Any, list[str]]:
    twin, habits = as_served(tokenizer)
    split = split_as_served(twin)
    if split is not twin:
        habits = [*habits, "marks, and capital letters beyond ASCII, part words otherwise"]
    return split, habits


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _whole(tokenizer: Any, ids: list[int], add_special: bool) -> list[int]:
    return with_bos(tokenizer, ids) if add_special else ids


def _split(tokenizer: Any, text: str, special: dict[str, int]) -> list[int]:
    """The tokenizer's ids of a text in which some words are special tokens."""
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        ids += [special[part]] if part in special else _ids(tokenizer, part)
    return ids

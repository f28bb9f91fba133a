"""Texts that are trained with other ids than llama.cpp would give them when they are served.

Nothing in a GGUF file can make the ids equal, so a row with such a text is refused. Two kinds are known. White space
after a special token is one (`pipeline.prompt.token_white_space`). The other is how words are told apart: Mistral Nemo
and gpt-oss end a word where a small letter is followed by a capital, and a combining mark belongs to its letter.
llama.cpp, which splits them by a pattern of its own (llm_tokenizer_bpe in its src/llama-vocab.cpp), knows small and
capital letters in ASCII alone, and takes marks for punctuation:

    "bonÉté"                    trained: "bon", "Été"       llama.cpp: "bonÉté"
    "e\u0301" (e, then acute)   trained: "e\u0301"          llama.cpp: "e", "\u0301"
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from pipeline.data.findings import RowError
from pipeline.prompt.token_white_space import left, takes_any
from pipeline.prompt.tokenizer import from_its_files

# Letters as the trained patterns have them, and as llama.cpp's have them instead.
_LETTERS = {
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]": r"(?:(?=[\p{L}])[^a-z])",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]": r"(?:(?=[\p{L}])[^A-Z])",
}
# The patterns that it has so: "tekken" and "gpt-4o". Others with these letters it has as they are.
_START = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = _LETTERS
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT = {
    f"{_START}{_UPPER}*{_LOWER}+{suffix}|{_START}{_UPPER}+{_LOWER}*{suffix}|{digits}{_OTHERS}"
    for suffix, digits in (("", r"\p{N}"), ("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"))
}


@lru_cache(maxsize=8)
def split_as_served(tokenizer: Any) -> Any:
    """The tokenizer with words told apart as llama.cpp does; itself where that is the same.

    Args:
        tokenizer: of transformers.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return tokenizer
    steps = json.loads(backend.pre_tokenizer.__getstate__())
    if steps["type"] != "Sequence" or len(steps["pretokenizers"]) != 2:
        return tokenizer
    pattern = (steps["pretokenizers"][0].get("pattern") or {}).get("Regex")
    if pattern not in _SPLIT:
        return tokenizer
    for trained, served in _LETTERS.items():
        pattern = pattern.replace(trained, served)

    def edit(whole: dict[str, Any]) -> None:
        whole["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern

    return from_its_files(tokenizer, edit)


def refuse_other_ids(tokenizer: Any, texts: Iterable[str], place: str) -> None:
    """Refuse a row with such a text.

    Args:
        tokenizer: the one that is trained with.
        texts: the row's, rendered; read only where some are known to differ.
        place: where the row stands.

    Raises:
        RowError: with the place.
    """
    twin = split_as_served(tokenizer)
    for text in texts if twin is not tokenizer or takes_any(tokenizer) else ():
        if words := left(tokenizer, text):
            raise RowError(
                "white space that is trained as a part of a token and served as a token of its own",
                f"{place}: has the white space {words}, which the model's tokenizer takes for a part of that token and "
                "llama.cpp does not, so that other ids would be served than trained: strip it from the beginning of "
                'the message, or leave the row out with data.on_error = "skip"',
            )
        if word := _split_otherwise(tokenizer, twin, text):
            raise RowError(
                "letters or marks beyond ASCII that are served as other tokens than trained",
                f"{place}: {word!r} is split into other tokens by llama.cpp, which takes this tokenizer's marks and "
                "capital letters beyond ASCII otherwise, so that other ids would be served than trained: leave the "
                'row out with data.on_error = "skip", or take a base with another tokenizer',
            )


def _split_otherwise(tokenizer: Any, twin: Any, text: str) -> str:
    """Where a text gets other ids; "" where it does not."""
    if twin is tokenizer or text.isascii():  # the patterns differ in nothing that is ASCII
        return ""
    trained, served = ([*each(text, add_special_tokens=False).input_ids] for each in (tokenizer, twin))
    if trained == served:
        return ""
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(trained, served, strict=False)))
    found: str = tokenizer.decode(trained[max(0, same - 2) : same + 4])
    return found

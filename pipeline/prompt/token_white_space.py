"""The white space that special tokens take from the texts beside them, in transformers and in llama.cpp.

An added token of transformers may take the white space after it (rstrip) or before it (lstrip), which is then in no id.
No key of a GGUF file says so. llama.cpp goes by the model's name: in one of Phi-3's every added token but three takes
what follows it, in all others none takes anything (llama_vocab::impl::load in its src/llama-vocab.cpp). And what it
takes is the white space of ASCII alone. An example, of Phi-3:

    "<|user|>\\n\\u3000Hi"    transformers: "<|user|>", "Hi"    llama.cpp: "<|user|>", "\\u3000Hi"

So a model is trained with the tokens taking what they will take when it is served (`taking`), and a text is known in
which even that comes to other ids (`parts`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

# In a model's name, for llama.cpp.
PHI3 = re.compile("phi-?3", re.IGNORECASE)
_TAKE_NOTHING = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_NEEDED = _TAKE_NOTHING | {"</s>"}  # without one of them llama.cpp ends
# What both call white space, and what transformers alone does (Unicode's White_Space).
_ASCII = " \t\n\x0b\x0c\r"
_OTHER = "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def taking_in_phi3(words: Iterable[str]) -> dict[str, bool]:
    """Which added tokens take the white space after them in llama.cpp, of a model that is named as Phi-3's are."""
    return {word: word not in _TAKE_NOTHING for word in words}


def taking_by_name(name: str, words: Iterable[str]) -> dict[str, bool]:
    """Which added tokens take the white space after them in llama.cpp, of a model of this name."""
    return taking_in_phi3(words) if PHI3.search(name) else dict.fromkeys(words, False)


def taking(added: Mapping[str, bool]) -> dict[str, bool]:
    """Which added tokens take the white space after them in llama.cpp, with the name that is nearer to their own way.

    Args:
        added: the texts of the tokens, and whether they do in transformers.
    """
    phi3 = taking_in_phi3(added)
    changed = sum(phi3[word] != takes for word, takes in added.items())
    if added.keys() >= _NEEDED and changed < sum(added.values()):
        return phi3
    return dict.fromkeys(added, False)


def parts(tokenizer: Any, text: str) -> list[str]:
    """A text, cut where llama.cpp leaves white space that the tokenizer takes: it reads each part by itself.

    Args:
        tokenizer: of transformers, whose tokens take what `taking` says.
        text: as it is trained.
    """
    if (found := _left(tokenizer)) is None:
        return [text]
    ends = [0, *(match.end() for match in found.finditer(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def left(tokenizer: Any, text: str) -> str:
    """The first white space of a text that the tokenizer takes and llama.cpp leaves, in words; "" without any."""
    found = _left(tokenizer)
    match = found.search(text) if found is not None else None
    if match is None:
        return ""
    return f"U+{ord(text[match.end()]):04X} after {match[0].rstrip(_ASCII)}"


def takes_any(tokenizer: Any) -> bool:
    """Whether any token takes the white space after it."""
    return _left(tokenizer) is not None


@lru_cache(maxsize=8)
def _left(tokenizer: Any) -> re.Pattern[str] | None:
    words = {token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip}
    if not words:
        return None
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})[{_ASCII}]*(?=[{_OTHER}])")

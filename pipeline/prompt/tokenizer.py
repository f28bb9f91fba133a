"""The tokenizer that a model is trained with: the base's, made to read every text as llama.cpp will read it.

llama.cpp has no Unicode normalisation, and some words are control tokens to it in whatever vocabulary has them. It
cannot be taught otherwise by a GGUF file, so a model is trained on the ids that it will be served.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.errors import UserError

# Where one of these is a word of a vocabulary, llama.cpp ends answers at it and makes it a control token, whatever the
# file says (src/llama-vocab.cpp, special_eog_ids).
CONTROL_WORDS = frozenset(
    {
        "</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<end_of_turn>", "<end_of_utterance>", "<turn|>",
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|return|>",
        "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    }
)  # fmt: skip
# In a vocabulary with one of these, llama.cpp takes </s> for an ordinary word again.
_ORDINARY_END = ("<|tool_response>", "<|plamo:eos|>")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> tuple[Any, list[str]]:
    """A base's tokenizer as it is trained, and what it does otherwise than the base's own, in words."""
    from transformers import AutoTokenizer

    return as_served(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))


def saved_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer as it was saved there: the one that a model was trained with.

    Raises:
        UserError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no tokenizer can be loaded from it: {error}") from None


def as_served(tokenizer: Any) -> tuple[Any, list[str]]:
    """A tokenizer that gives the ids of llama.cpp where it is known to differ, and what was changed, in words.

    Args:
        tokenizer: of transformers; it is returned itself where there is nothing to change, or no fast one.
    """
    from tokenizers import AddedToken, normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer, []
    normalized = isinstance(backend.normalizer, normalizers.NFC)
    words = _ordinary_control_words(tokenizer)
    changes = []
    if normalized or words:
        tokenizer = _from_its_files(tokenizer)
    if normalized:
        tokenizer.backend_tokenizer.normalizer = None
        changes.append("texts are not normalised (NFC)")
    if words:
        added = [AddedToken(word, normalized=False, special=True) for word in words]
        tokenizer.add_tokens(added, special_tokens=True)
        changes.append(f"special tokens in a text: {', '.join(words)}")
    return tokenizer, changes


def _ordinary_control_words(tokenizer: Any) -> list[str]:
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    words = {word for word in CONTROL_WORDS & vocabulary.keys() if vocabulary[word] not in added}
    if any(word in vocabulary for word in _ORDINARY_END):
        words.discard("</s>")
    return sorted(words)


def _from_its_files(tokenizer: Any) -> Any:
    """The same in the class that reads tokenizer.json as it is: a family's own class builds its normaliser anew."""
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

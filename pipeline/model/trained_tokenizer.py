"""The tokenizer that a run's model is trained with: the base's; with adapters from elsewhere, that of their folders.

An adapter's folder may have a tokenizer or none, with a chat template or without. What it has goes first, then the
base's. Where neither has a template, the prompt that the adapter was trained with cannot be known, and is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.model.base import TOKENIZER_FILES, base_folder
from pipeline.model.config_file import text_config
from pipeline.prompt.tokenizer import load_tokenizer, saved_tokenizer

if TYPE_CHECKING:
    from pipeline.config import Config

# A checkpoint's folder holds pickles too: only these are ever read of it.
_FILES = (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


def adapter_files(config: Config) -> list[Path]:
    """What a run reads of the folders of adapters from elsewhere: settings, tensors, tokenizer; none without one."""
    names = ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", *_FILES)
    return [path for folder in config.given_adapters for name in names if (path := folder / name).is_file()]


def trained_tokenizer(config: Config) -> tuple[Any, list[str]]:
    """The tokenizer, and what should be known of it, in sentences.

    Raises:
        UserError: there is no base; an adapter has another vocabulary; no chat template is known, or two.
    """
    model, given = config.model, config.given_adapters
    base = base_folder(model)
    trusted, chosen = model.trust_remote_code, model.chat_template
    sources = [tokenizer_source(adapter, base, chosen) for adapter in given] or [(base, [])]
    once = {folder: load_tokenizer(folder, trust_remote_code=trusted, chat_template=chosen) for folder in dict(sources)}
    loaded = [once[folder] for folder, _ in sources]
    tokenizer = loaded[0][0]
    for (other, _), folder in zip(loaded[1:], given[1:], strict=True):
        if other.chat_template != tokenizer.chat_template:
            raise UserError(
                f"adapters: {given[0]} was trained with another chat template than {folder}, and the combination has "
                "one: give it (model.chat_template, or --template)"
            )
        if other.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"adapters: {given[0]} and {folder} have tokenizers with other tokens: only adapters with the same "
                "vocabulary can be combined"
            )
    said = [
        words for (_, of_source), (_, changed) in zip(sources, loaded, strict=True) for words in of_source + changed
    ]
    return tokenizer, list(dict.fromkeys(said))


def tokenizer_source(adapter: Path, base: Path, chat_template: str | None = None) -> tuple[Path, list[str]]:
    """Which of two folders has the tokenizer that an adapter was trained with, and what should be known of it.

    Args:
        adapter: the adapter's folder.
        base: the base's.
        chat_template: one that is given, where the folders' own do not count.

    Raises:
        UserError: the adapter has another vocabulary, or no chat template is known.
    """
    bases_own, said = saved_tokenizer(base), []
    if any((adapter / name).is_file() for name in TOKENIZER_FILES):
        own = saved_tokenizer(adapter)
        said = _compare(own, bases_own, adapter, base)
        if own.chat_template or chat_template:
            return adapter, said
    if not (chat_template or bases_own.chat_template):
        raise UserError(
            f"{adapter}: neither the adapter nor its base has a chat template, so that the prompt that it was trained "
            "with cannot be known: give it (model.chat_template, or --template): a well-known one's name or a Jinja "
            "file"
        )
    if not chat_template:
        said.append(
            "the adapter's folder has no chat template: the base's is taken for the one that it was trained with; if "
            "it was another, set model.chat_template"
        )
    return base, said


def _compare(own: Any, bases: Any, adapter: Path, base: Path) -> list[str]:
    """Refuse another vocabulary than the base's, and say which tokens were added in rows that it had to spare."""
    rows = text_config(base).get("vocab_size")
    words = {number: word for word, number in bases.get_vocab().items()}
    added = []
    for word, number in sorted(own.get_vocab().items(), key=lambda item: item[1]):
        if number not in words:
            added.append(word)
            if isinstance(rows, int) and number >= rows:
                raise UserError(
                    f"{adapter}: its tokenizer has a token {word!r} with the number {number:,}, and the base {base} "
                    f"has {rows:,} rows: the vocabulary is another one than the base's. Give the base that it was "
                    "trained on, with the tokens that were added to it"
                )
        elif words[number] != word:
            raise UserError(
                f"{adapter}: token {number:,} is {word!r} in its tokenizer and {words[number]!r} in that of {base}: it "
                "was trained on a base with another vocabulary"
            )
    return [f"the adapter's tokenizer adds {', '.join(map(repr, added[:5]))} to the base's"] if added else []

"""The tokenizer that a model is trained with: the base's, made to read every text as llama.cpp will read it.

llama.cpp has no Unicode normalisation, some words are control tokens to it in whatever vocabulary has them, and few
tokens take white space from the texts beside them. It cannot be taught otherwise by a GGUF file, so a model is trained
on the ids that it will be served.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.errors import UserError
from pipeline.prompt.chat_templates import DEFAULT, put_on
from pipeline.prompt.control_tokens import CONTROL_WORDS
from pipeline.prompt.token_white_space import taking
from pipeline.resources import chat_templates

# In a vocabulary with one of these, llama.cpp takes </s> for an ordinary word again.
_ORDINARY_END = ("<|tool_response>", "<|plamo:eos|>")


def load_tokenizer(
    folder: Path, *, trust_remote_code: bool = False, chat_template: str | None = None
) -> tuple[Any, list[str]]:
    """A base's tokenizer as it is trained, with the chat template that it is trained with.

    Args:
        folder: the base.
        trust_remote_code: run Python code that comes with it.
        chat_template: a well-known one's name or a file's path, instead of the base's own.

    Returns:
        The tokenizer, and what it does otherwise than the base's own, in sentences.

    Raises:
        UserError: the chat template cannot be read, or needs tokens that the base does not have.
    """
    beyond = beyond_embedding(folder)
    tokenizer = base_tokenizer(folder, trust_remote_code=trust_remote_code)
    tokenizer, changes = as_served(_without(tokenizer, beyond) if beyond.tokens else tokenizer)
    if beyond.tokens:
        changes.append(f"{beyond} and are ordinary text")
    said = [f"the tokenizer is trained as llama.cpp will read texts: {'; '.join(changes)}"] if changes else []
    if chat_template is not None:
        words = put_on(tokenizer, chat_template)
        said.append(f"model.chat_template = {chat_template}: {'; '.join(words)}")
    elif not tokenizer.chat_template:
        words = put_on(tokenizer, DEFAULT)
        said.append(
            f"the base has no chat template and is trained with {DEFAULT}: {'; '.join(words)}. For another one set "
            f"model.chat_template: {', '.join(chat_templates())}, or the path of a Jinja file"
        )
    return tokenizer, said


def base_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """A base's own tokenizer, in a class that reads texts as its files say."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    file = folder / "tokenizer.json"
    if file.is_file() and not (_splits_as_its_file(tokenizer, file) and _saved_as_it_is(tokenizer)):
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


@dataclass(frozen=True)
class Beyond:
    """Tokens of a base that its embedding has no rows for.

    Attributes:
        tokens: their texts with their ids.
        size: how many tokens the tokenizer has.
        rows: how many the embedding has.
    """

    tokens: dict[str, int]
    size: int
    rows: int

    def __str__(self) -> str:
        sizes = f"the tokenizer has {self.size:,} tokens, it {self.rows:,} rows"
        return f"{_first(list(self.tokens))} have no row in the embedding ({sizes})"

    def refuse_in(self, text: str, place: str) -> None:
        """Refuse a text that spells one of them.

        Raises:
            UserError: with both numbers and the place.
        """
        for token, number in self.tokens.items():
            if token in text:
                raise UserError(
                    f"{place}: {token!r} is token {number:,} of the base, and its embedding has {self.rows:,} rows for "
                    f"{self.size:,} tokens: leave it out of the text, or give a base whose embedding was resized "
                    f"(model.resize_token_embeddings({self.size})) and saved"
                )


def beyond_embedding(folder: Path) -> Beyond:
    """The tokens of a base whose ids its embedding does not reach."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        text = config.get("text_config")
        rows = (text if isinstance(text, dict) else {}).get("vocab_size") or config.get("vocab_size")
        vocabulary = tokenizer["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # a Unigram's: pairs of a text and its score
            vocabulary = {text: number for number, (text, _) in enumerate(vocabulary)}
        ids = vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no tokenizer.json, or one of its own kind
        return Beyond({}, 0, 0)
    if not isinstance(rows, int):
        return Beyond({}, len(ids), 0)
    return Beyond({token: number for token, number in ids.items() if number >= rows}, len(ids), rows)


def _without(tokenizer: Any, beyond: Beyond) -> Any:
    """The tokenizer without tokens that no model could read.

    Raises:
        UserError: texts cannot be read without them.
    """
    from transformers import PreTrainedTokenizerFast

    roles = {name: value for name, value in tokenizer.special_tokens_map.items() if value in beyond.tokens}
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = {token["content"] for token in whole["added_tokens"]}
        needed = [name for name in roles if name in ("bos_token", "eos_token", "unk_token")]
        if needed or not beyond.tokens.keys() <= added:
            first = f"its {needed[0]} " if needed else ""
            raise UserError(
                f"model.base: {first}{beyond}: give a base whose embedding was resized "
                f"(model.resize_token_embeddings({beyond.size})) and saved"
            )
        whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] not in beyond.tokens]
        vocabulary = whole["model"]["vocab"]
        if isinstance(vocabulary, dict):
            whole["model"]["vocab"] = {word: number for word, number in vocabulary.items() if word not in beyond.tokens}
        (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps(_unnamed(settings, beyond.tokens)), encoding="utf-8")
        return PreTrainedTokenizerFast.from_pretrained(folder)


def _unnamed(value: Any, tokens: dict[str, int]) -> Any:
    """Settings without what names these tokens."""

    def named(item: Any) -> bool:
        return (item if isinstance(item, str) else item.get("content") if isinstance(item, dict) else None) in tokens

    if isinstance(value, dict):
        return {key: _unnamed(item, tokens) for key, item in value.items() if not named(item)}
    return [_unnamed(item, tokens) for item in value if not named(item)] if isinstance(value, list) else value


def saved_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer as it was saved there: the one that a model was trained with.

    It is not to be changed: loading one with a large vocabulary takes seconds, so folders with the same files, as an
    adapter's and the merged model's are, have the same.

    Raises:
        UserError: there is none that can be loaded.
    """
    try:
        # Beside a Qwen2's config.json AutoTokenizer takes another class than the one that was saved, which normalises.
        plain = _saved_class(folder) in ("TokenizersBackend", "PreTrainedTokenizerFast")
        if (folder / "tokenizer.json").is_file():
            return _of_folder(str(folder), plain, _digest(folder, plain))
        return _load(folder, plain)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no tokenizer can be loaded from it: {error}") from None


_FILES = ("*token*", "vocab*", "merges*", "chat_template*", "*chat_templates/*")  # what a tokenizer is loaded from
_KEPT = 4
_loaded: dict[bytes, Any] = {}  # the last ones, by their files


def _digest(folder: Path, plain: bool) -> bytes:
    patterns = _FILES if plain else (*_FILES, "config.json")
    content = hashlib.blake2b()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        content.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
    return content.digest()


@lru_cache(maxsize=_KEPT)
def _of_folder(folder: str, plain: bool, content: bytes) -> Any:
    """The tokenizer of files with this digest, under the name of their folder."""
    if content not in _loaded:
        for oldest in list(_loaded)[: len(_loaded) - _KEPT + 1]:
            del _loaded[oldest]
        _loaded[content] = _load(Path(folder), plain)
    tokenizer = copy.copy(_loaded[content])
    tokenizer.name_or_path = folder
    tokenizer.init_kwargs = {**tokenizer.init_kwargs, "name_or_path": folder}
    return tokenizer


def _load(folder: Path, plain: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(str(folder), trust_remote_code=False)


def _saved_class(folder: Path) -> str | None:
    """The class that a saved tokenizer had, where a tokenizer.json says all of it."""
    path = folder / "tokenizer_config.json"
    if not path.is_file() or not (folder / "tokenizer.json").is_file():
        return None
    name: str | None = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    return name


@dataclass(frozen=True)
class Saved:
    """What a saved tokenizer says of itself.

    Attributes:
        bos, eos: the ids of the tokens that begin and end a text; None for one that it does not have.
        size: how many tokens it has.
        chat_template: its Jinja; None without one.
    """

    bos: int | None
    eos: int | None
    size: int
    chat_template: str | None


def read_saved(folder: Path) -> Saved:
    """Read a saved tokenizer's files; it is loaded, which takes seconds, only where they do not say all.

    Raises:
        UserError: there is none that can be loaded.
    """
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = {token["content"]: int(token["id"]) for token in whole["added_tokens"]}
        words = len(whole["model"]["vocab"].keys() | added.keys())
        bos, eos = (_id_of(settings[f"{name}_token"], added) for name in ("bos", "eos"))
        path = folder / "chat_template.jinja"
        template = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
        if (folder / "additional_chat_templates").exists() or not isinstance(template, str | None):
            raise ValueError("several chat templates")
        return Saved(bos, eos, words, template)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        tokenizer = saved_tokenizer(folder)
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return Saved(tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer), template)


def _id_of(token: Any, added: dict[str, int]) -> int | None:
    text = token["content"] if isinstance(token, dict) else token
    return None if text is None else added[text]


def as_served(tokenizer: Any) -> tuple[Any, list[str]]:
    """A tokenizer that gives the ids of llama.cpp where it is known to differ, and what was changed, in words.

    Args:
        tokenizer: of transformers; it is returned itself where there is nothing to change, or no fast one.
    """
    from tokenizers import AddedToken, normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer, []
    normalized = isinstance(backend.normalizer, normalizers.NFC | normalizers.NFKC | normalizers.NFD | normalizers.NFKD)
    form = type(backend.normalizer).__name__
    words = _ordinary_control_words(tokenizer)
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    takes = taking({word: token.rstrip for word, token in added.items()} | dict.fromkeys(words, False))
    fewer = [word for word, token in added.items() if token.lstrip or token.rstrip > takes[word]]
    more = [word for word, token in added.items() if takes[word] > token.rstrip]
    changes = []
    if normalized or words or fewer or more:

        def edit(whole: dict[str, Any]) -> None:
            if normalized:
                whole["normalizer"] = None
            for token in whole["added_tokens"]:
                token |= {"lstrip": False, "rstrip": takes[token["content"]]}

        tokenizer = from_its_files(tokenizer, edit)
    if normalized:
        changes.append(f"texts are not normalised ({form})")
    if words:
        tokens = [AddedToken(word, rstrip=takes[word], normalized=False, special=True) for word in words]
        tokenizer.add_tokens(tokens, special_tokens=True)
        changes.append(f"special tokens in a text: {', '.join(words)}")
    if fewer:
        changes.append(f"no white space is taken from the texts beside {_first(fewer)}")
    if more:
        changes.append(f"the white space after {_first(more)} is taken")
    return tokenizer, changes


def _first(words: Sequence[str]) -> str:
    return ", ".join(words[:5]) + ", ..." * (len(words) > 5)


def _ordinary_control_words(tokenizer: Any) -> list[str]:
    number_of, added = tokenizer.backend_tokenizer.token_to_id, tokenizer.added_tokens_decoder
    words = {word for word in CONTROL_WORDS if number_of(word) is not None and number_of(word) not in added}
    if any(number_of(word) is not None for word in _ORDINARY_END):
        words.discard("</s>")
    return sorted(words)


_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def _parts(tokenizer: Any) -> dict[str, Any]:
    """All that a tokenizer does but its vocabulary, as tokenizer.json writes it."""
    found = {name: getattr(tokenizer.backend_tokenizer, name) for name in _PARTS}
    return {name: None if part is None else json.loads(part.__getstate__()) for name, part in found.items()}


def _parts_of_file(file: Path) -> dict[str, Any]:
    """The same of a tokenizer.json; its vocabulary, which usually comes last, is not read, for it takes a second."""
    text, decode, found = file.read_text(encoding="utf-8"), json.JSONDecoder().raw_decode, dict[str, Any]()
    at = _after_sign(text, 0)
    while set(_PARTS) - found.keys() and text[at] != "}":
        name, at = decode(text, at)
        found[name], at = decode(text, _after_sign(text, at))
        at = _after_sign(text, at)
    return found


def _after_sign(text: str, at: int) -> int:
    """Where the next key or value of a JSON object begins, behind one brace, colon or comma."""
    return re.compile(r"\s*[{:,]?\s*").match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too


def _splits_as_its_file(tokenizer: Any, file: Path) -> bool:
    """Whether a class splits and normalises texts as tokenizer.json says.

    GPT-2's own, which other tokenizers over bytes name as theirs, splits them as GPT-2 did.
    """
    own, whole = _parts(tokenizer), _parts_of_file(file)
    return all(own[part] == whole.get(part) for part in ("normalizer", "pre_tokenizer"))


_FEW = 1000  # words of a vocabulary; how a class builds the rest of itself does not depend on them


def _saved_as_it_is(tokenizer: Any) -> bool:
    """Whether its saved files read texts as it does.

    Llama 2's own class does not save a setting that it builds itself from, nor is it what tokenizer.json says.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:
        return True
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        _shorten(Path(folder) / "tokenizer.json")
        saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return _parts(saved) == _parts(tokenizer)


def _shorten(file: Path) -> None:
    """Leave a tokenizer.json the first words of its vocabulary and those that were added."""
    if not file.is_file():
        return
    whole = json.loads(file.read_text(encoding="utf-8"))
    model, added = whole["model"], {token["content"] for token in whole["added_tokens"]}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {word: id for word, id in model["vocab"].items() if id < _FEW or word in added}
    else:
        model["vocab"] = model["vocab"][:_FEW]
    if "merges" in model:
        model["merges"] = []
    file.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")


def from_its_files(tokenizer: Any, edit: Callable[[dict[str, Any]], None]) -> Any:
    """The same, once its tokenizer.json is edited, in the class that reads that as it is.

    A family's own class builds its normaliser anew.
    """
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        whole = json.loads(file.read_text(encoding="utf-8"))
        edit(whole)
        file.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        return PreTrainedTokenizerFast.from_pretrained(folder)

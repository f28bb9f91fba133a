"""The tokenizer of a GGUF file, rebuilt from its own tokens, merges or scores, and types.

A file names the way in which it splits texts; how that way is spelled in a tokenizer.json is known here for those that
were held against the original tokenizers. Whether the rebuilt one is right is then asked of llama.cpp, which reads the
file as it is: on texts that were made to part two tokenizers, every id is the same, or the file is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.llamacpp.gguf_file import GGUFInfo
from pipeline.llamacpp.library import LlamaModel
from pipeline.prompt.hostile_strings import hostile_strings
from pipeline.prompt.token_white_space import left, taking_by_name
from pipeline.prompt.tokenizer import as_served

# Types of tokens in a file (llama_token_type).
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
INSTEAD = "give the original model, as a folder or a hub id (owner/name)"
_STRINGS = 2000
# Parts of the patterns.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Splitting:
    """How a BPE over bytes splits texts before it merges.

    Attributes:
        pattern: a regular expression; "" for GPT-2's own.
        digits: digits stand alone, before the pattern.
        nfc: texts are normalised first, which is llama.cpp's to leave out.
        whole_words: a word that is a token is never merged from parts.
        bos: BOS is added where the file does not say.
    """

    pattern: str = ""
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


# By tokenizer.ggml.pre.
SPLITTINGS = {
    "smollm": Splitting(digits=True),
    "llama-bpe": Splitting(
        "|".join((_WORDS, r"\p{N}{1,3}", _SIGNS, _SPACES)),
        whole_words=True,
        bos=True,
    ),
    "qwen2": Splitting(
        "|".join((_WORDS, r"\p{N}", _SIGNS, _SPACES)),
        nfc=True,
    ),
}


def special_ids(info: GGUFInfo) -> dict[str, int]:
    """The ids of bos, eos, eot, unknown and padding that the file names, of a tokenizer that can be rebuilt.

    Raises:
        UserError: it cannot be rebuilt.
    """
    where = f"model.base: {info.path}"
    metadata = info.metadata
    tokens, types = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not tokens or not types or len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise UserError(f"{where}: has no tokens with a type for each: {INSTEAD}")
    kind, splitting = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2":
        if splitting not in SPLITTINGS:
            raise UserError(
                f"{where}: its tokenizer splits texts in the way {splitting!r} (tokenizer.ggml.pre), of which a GGUF "
                f"file's can be {', '.join(SPLITTINGS)}: {INSTEAD}"
            )
        needed = "merges"
    elif kind == "llama":
        needed = "scores"
    else:
        raise UserError(f"{where}: its tokenizer is of the kind {kind!r}, not gpt2 or llama: {INSTEAD}")
    if not metadata.get(f"tokenizer.ggml.{needed}"):
        raise UserError(f"{where}: its tokenizer has no {needed}: {INSTEAD}")
    named = {
        name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "unknown", "padding")
    }
    ids = {name: id for name, id in named.items() if id is not None}
    if beyond := [f"{name} is {id}" for name, id in ids.items() if not 0 <= id < len(tokens)]:
        raise UserError(f"{where}: of {len(tokens):,} tokens {beyond[0]}: {INSTEAD}")
    if "eos" not in ids:
        raise UserError(f"{where}: names no token that ends a text (tokenizer.ggml.eos_token_id): {INSTEAD}")
    return ids


def tokenizer_of(info: GGUFInfo, pad_token: str | None = None) -> Any:
    """The file's tokenizer as one of `transformers`.

    Args:
        info: the file, which `special_ids` takes.
        pad_token: instead of the file's. One that ends a text or a turn is none: it would not be trained.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    metadata, ids = info.metadata, special_ids(info)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    kinds = dict(zip(tokens, types, strict=True))
    # Rows of the embedding that have no token: the converter fills them up.
    vocabulary = {token: id for id, token in enumerate(tokens) if (types[id], token) != (_UNUSED, f"[PAD{id}]")}
    bytes_kind = metadata["tokenizer.ggml.model"] == "gpt2"
    tokenizer = _over_bytes(metadata, vocabulary) if bytes_kind else _over_characters(metadata, vocabulary, kinds)
    added = [token for token in vocabulary if kinds[token] in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    takes = taking_by_name(metadata.get("general.name", ""), added)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kinds[token] != _USER_DEFINED, normalized=False, rstrip=takes[token])
            for token in added
        ]
    )
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(metadata)) and "bos" in ids
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    around = [*([tokens[ids["bos"]]] if adds_bos else []), "$A", *([tokens[ids["eos"]]] if adds_eos else [])]
    if len(around) > 1:
        used = [(part, vocabulary[part]) for part in around if part in vocabulary]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around,
            pair=[*around, *(f"{'$B' if part == '$A' else part}:1" for part in around)],
            special_tokens=used,
        )
    if pad_token is None and "padding" in ids and ids["padding"] not in (ids["eos"], ids.get("eot")):
        pad_token = tokens[ids["padding"]]
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown"}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{key: tokens[ids[name]] for key, name in named.items() if name in ids},
        pad_token=pad_token,
        model_max_length=metadata[f"{info.architecture}.context_length"],
        clean_up_tokenization_spaces=False,
        add_bos_token=bool(adds_bos),
    )
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    return wrapped


def refuse_other_tokens(info: GGUFInfo, tokenizer: Any) -> None:
    """Ask llama.cpp, with the file as it is, for the ids of hostile texts.

    Raises:
        UserError: the rebuilt tokenizer gives others.
    """
    served, _ = as_served(tokenizer)
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    with LlamaModel(info.path, vocabulary_only=True) as original:
        for text in (*hostile_strings(_STRINGS, special_tokens=special), "Hello"):
            theirs, ours = original.tokenize(text, add_special=True), served(text)["input_ids"]
            # A row with white space that llama.cpp alone leaves to the text is refused by its place.
            if ours != theirs and not left(served, text):
                raise UserError(
                    f"model.base: {info.path}: its tokenizer cannot be rebuilt exactly: {text[:40]!r} is {theirs[:8]} "
                    f"to llama.cpp and would be {ours[:8]}: {INSTEAD}"
                )


def _adds_bos(metadata: dict[str, Any]) -> bool:
    splitting = SPLITTINGS.get(metadata.get("tokenizer.ggml.pre", ""))
    return splitting.bos if metadata["tokenizer.ggml.model"] == "gpt2" and splitting else True


def _over_bytes(metadata: dict[str, Any], vocabulary: dict[str, int]) -> Any:
    """A BPE over bytes: GPT-2's kind."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    splitting = SPLITTINGS[metadata["tokenizer.ggml.pre"]]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.whole_words))
    pieces: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.digits else []
    if splitting.pattern:
        pieces.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    pieces.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splitting.pattern))
    # Some bytes (control characters, mostly) may have no token. llama.cpp drops them after merging, the `tokenizers`
    # library before it, which would join what they kept apart: so the text is cut at them.
    if without_token := sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(vocabulary)):
        pieces.append(pre_tokenizers.Split(Regex(f"[{''.join(without_token)}]"), behavior="removed"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.normalizer = normalizers.NFC() if splitting.nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _over_characters(metadata: dict[str, Any], vocabulary: dict[str, int], kinds: dict[str, int]) -> Any:
    """A BPE over characters, with bytes for what they lack: SentencePiece's kind."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = next((token for token in vocabulary if kinds[token] == _UNKNOWN), None)
    model = models.BPE(
        vocab=vocabulary,
        merges=list(_merges(metadata["tokenizer.ggml.scores"], vocabulary, kinds)),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _merges(scores: list[float], vocabulary: dict[str, int], kinds: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the likeliest piece first: what SentencePiece merges."""
    pieces = {
        token: id for token, id in vocabulary.items() if kinds[token] not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    }
    for piece in sorted(pieces, key=lambda piece: -scores[pieces[piece]]):
        pairs = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        yield from sorted(
            (pair for pair in pairs if pair[0] in pieces and pair[1] in pieces),
            key=lambda pair: (pieces[pair[0]], pieces[pair[1]]),
        )

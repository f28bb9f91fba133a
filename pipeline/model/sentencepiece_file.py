"""A SentencePiece model that is written from a tokenizer.json, for llama.cpp's converter.

Llama 2, Mistral and others were made by SentencePiece, and the converter reads how their pieces are ranked from
tokenizer.model alone. Without it every piece gets the same score, and words fall apart otherwise than they were trained
(llama.cpp#7062 is of that kind). transformers saves no such file; the merges of tokenizer.json rank the pieces as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "tokenizer.model"


def write_sentencepiece(folder: Path) -> None:
    """Write tokenizer.model into a folder whose tokenizer.json needs it and where there is none.

    What else the converter has to be told of the tokenizer is written into tokenizer_config.json.

    Args:
        folder: a model's, with config.json.
    """
    if not (folder / "tokenizer.json").is_file():
        return
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    kind = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    if not _is_sentencepiece(tokenizer):
        if kind == "phi3":  # Phi-4's is a BPE over bytes, which the converter knows by the name of its class alone
            _tell(folder, {"tokenizer_class": "GPT2Tokenizer"})
        return
    if not (folder / FILE).exists():
        if kind.startswith("gemma3"):  # then its converter reads the merges themselves
            return
        (folder / FILE).write_bytes(_model(tokenizer))
    # The converter takes added tokens from a list that transformers 5 does not save: else texts are split in them.
    # Of the unknown token, which it would call a control token, tokenizer.model says it all.
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = [token for token in tokenizer["added_tokens"] if token["content"] != _unknown(tokenizer)]
    _tell(folder, {"added_tokens_decoder": {str(token["id"]): {key: token[key] for key in flags} for token in added}})


def _unknown(tokenizer: dict[str, Any]) -> str:
    return tokenizer["model"].get("unk_token") or "<unk>"


def _tell(folder: Path, more: dict[str, Any]) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if more.items() <= settings.items():
        return
    file.write_text(json.dumps(settings | more, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether its pieces are characters, with bytes for what they lack: a BPE over bytes has no such fallback."""
    model = tokenizer["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def _model(tokenizer: dict[str, Any]) -> bytes:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model = tokenizer["model"]
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    texts = {number: text for text, number in model["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    # Gemma's tab stands where SentencePiece, which wants every byte, has its byte.
    lacking = {chr(byte): name for byte in range(128) if (name := f"<0x{byte:02X}>") not in model["vocab"]}
    texts |= {number: lacking[text] for number, text in texts.items() if text in lacking and number not in added}
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), rank)
    proto = ModelProto()
    kinds = ModelProto.SentencePiece
    for number in range(max(texts) + 1):
        text = texts.get(number, f"[PAD{number}]")
        piece = proto.pieces.add(piece=text, score=-float(ranks.get(text, len(ranks))), type=kinds.NORMAL)
        if number not in texts:
            piece.type = kinds.UNUSED
        elif text == _unknown(tokenizer):
            piece.type = kinds.UNKNOWN
        elif number in added:
            piece.type = kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED
        elif text.startswith("<0x") and len(text) == 6:
            piece.type = kinds.BYTE
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.trainer_spec.byte_fallback = True
    unknown = [number for number, piece in enumerate(proto.pieces) if piece.type == kinds.UNKNOWN]
    proto.trainer_spec.unk_id = unknown[0] if unknown else 0
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.add_dummy_prefix = "prepend" in json.dumps(
        [tokenizer["normalizer"], tokenizer["pre_tokenizer"]]
    )
    serialized: bytes = proto.SerializeToString()
    return serialized

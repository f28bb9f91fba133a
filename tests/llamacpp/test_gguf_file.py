"""Reading GGUF files, against gguf-py's own reader; and broken ones, each refused for what is wrong with it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from support import small_models

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.gguf_file import GGUFInfo, check, inspect


@pytest.mark.parametrize("make", [small_models.original_gguf, lambda: small_models.quantized()[0]])
def test_the_same_as_gguf_py_reads(make: Callable[[], Path]) -> None:
    path = make()
    info, reader = inspect(path), GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert info.metadata == theirs
    assert [(tensor.name, tensor.shape, tensor.type.lower()) for tensor in info.tensors] == [
        (tensor.name, tuple(tensor.shape.tolist()), tensor.tensor_type.name.lower()) for tensor in reader.tensors
    ]
    assert [tensor.bytes for tensor in info.tensors] == [tensor.n_bytes for tensor in reader.tensors]
    assert info.parameter_count == 134_515_008
    assert "output.weight" not in info.names  # the head is the embedding
    seen = set()
    for ours, other in zip(info.tensors, reader.tensors, strict=True):
        if ours.type not in seen:
            seen.add(ours.type)
            assert np.allclose(info.values(ours), dequantize(other.data, other.tensor_type), rtol=1e-6, atol=0)
    assert len(seen) > 2


def test_what_was_read_is_no_longer_believed_when_the_file_changes(tmp_path: Path) -> None:
    path, name = tmp_path / "a.gguf", b"general.architecture"
    path.write_bytes(small_models.original_gguf().read_bytes())
    long_ago = path.stat().st_mtime_ns - 10**10
    os.utime(path, ns=(long_ago, long_ago))
    inspect(path).metadata.clear()  # what one reader does with it is not for another
    assert inspect(path).architecture == "llama"
    with path.open("r+b") as file:
        file.seek(file.read(10**5).index(name) + len(name) + 12)  # past the type and the length
        file.write(b"other")
    assert inspect(path).architecture == "other"


def test_a_good_file_passes() -> None:
    info = check(small_models.quantized()[0])
    assert info.architecture == "llama"
    assert info.bits_per_weight == pytest.approx(6.165, abs=0.001)
    assert sum(info.parameters_by_type.values()) == info.parameter_count


VOCABULARY = [f"t{number}" for number in range(16)]


def tiny(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None] = lambda keys, tensors: None) -> Path:
    """A GGUF of a few numbers, changed before it is written."""
    generator = np.random.default_rng(0)
    keys: dict[str, Any] = {
        "file_type": 1,
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": VOCABULARY,
        "token_types": [1] * len(VOCABULARY),
        "token_merges": ["t 1", "t 2"],
        "eos_token_id": 2,
    }
    tensors = {
        "token_embd.weight": generator.normal(size=(16, 32)).astype(np.float32),
        "blk.0.attn_q.weight": generator.normal(size=(32, 32)).astype(np.float16),
        "output_norm.weight": np.ones(32, np.float32),
    }
    change(keys, tensors)
    writer = GGUFWriter(path, "llama")
    for name, value in keys.items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_tiny_file_is_a_good_one(tmp_path: Path) -> None:
    assert check(tiny(tmp_path / "model.gguf")).parameter_count == 16 * 32 + 32 * 32 + 32


def no_merges(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    del keys["token_merges"]


def no_pre(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    del keys["tokenizer_pre"]


def no_model(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    del keys["tokenizer_model"]


def eos_outside(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    keys["eos_token_id"] = 16


def more_tokens(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    keys["token_list"] = [*VOCABULARY, "extra"]


def not_a_number(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["blk.0.attn_q.weight"][7, 7] = np.nan


def infinity(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["output_norm.weight"][3] = np.inf


def zeros(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["blk.0.attn_q.weight"][:] = 0


def no_embedding(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    del tensors["token_embd.weight"]


def missing_block(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    keys["block_count"] = 2


def other_head(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["output.weight"] = np.ones((15, 32), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_merges, r"tokenizer\.ggml\.merges is missing"),
        (no_pre, r"tokenizer\.ggml\.pre is not set"),
        (no_model, r"key tokenizer\.ggml\.model is missing"),
        (eos_outside, r"eos_token_id is 16, beyond the vocabulary of 16"),
        (more_tokens, r"token_embd\.weight has 16 rows for 17 tokens"),
        (not_a_number, r"blk\.0\.attn_q\.weight holds NaN or infinity"),
        (infinity, r"output_norm\.weight holds NaN or infinity"),
        (zeros, r"blk\.0\.attn_q\.weight holds nothing but zeros"),
        (no_embedding, r"token_embd\.weight is missing"),
        (missing_block, r"of 2 blocks 1 are missing, the first is blk\.1"),
        (other_head, r"output\.weight has the shape \(32, 15\)"),
    ],
)
def test_a_broken_file(tmp_path: Path, change: Callable[..., None], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        check(tiny(tmp_path / "model.gguf", change))


def test_a_bias_may_have_stayed_at_zero(tmp_path: Path) -> None:
    def with_bias(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["blk.0.attn_q.bias"] = np.zeros(32, np.float32)

    assert "blk.0.attn_q.bias" in check(tiny(tmp_path / "model.gguf", with_bias)).names


def test_every_way_to_cut_a_file_short(tmp_path: Path) -> None:
    whole = tiny(tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 600, 7), len(whole) // 2, len(whole) - 33]:
        cut.write_bytes(whole[:length])
        with pytest.raises(PipelineError, match=r"cut short|not a GGUF"):
            check(cut)


def test_random_damage_never_ends_in_another_error(tmp_path: Path) -> None:
    whole = tiny(tmp_path / "model.gguf").read_bytes()
    generator = np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for position in generator.integers(0, len(data) - 2100, 3):
            data[position] = generator.integers(0, 256)
        damaged.write_bytes(data)
        try:
            check(damaged)
        except PipelineError:
            refused += 1
    assert refused > 30


def test_quantized_tensors_are_looked_into(tmp_path: Path) -> None:
    """NaN in a block's scale, and blocks of nothing, in the real Q4_K_M."""
    path, _, _ = small_models.quantized()
    info = inspect(path)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(path.read_bytes())
    scaled = next(tensor for tensor in info.tensors if tensor.type == "q4_K")
    empty = next(tensor for tensor in info.tensors if tensor.type == "q5_0")
    with damaged.open("r+b") as file:
        file.seek(scaled.offset + 10 * scaled.storage.bytes)
        file.write(b"\xff\x7f")
        file.seek(empty.offset)
        file.write(bytes(empty.bytes))
    with pytest.raises(PipelineError) as error:
        check(damaged)
    assert f"{scaled.name} holds NaN" in str(error.value)
    assert f"{empty.name} holds nothing but zeros" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        inspect(tmp_path / "nothing.gguf")
    with pytest.raises(UserError, match="is a folder"):
        inspect(tmp_path)
    text = tmp_path / "text.gguf"
    text.write_text("this is no GGUF file, only text")
    with pytest.raises(PipelineError, match="is not a GGUF file"):
        inspect(text)


def test_widths_of_heads_are_implied_where_there_are_heads() -> None:
    sizes: dict[str, Any] = {"x.embedding_length": 64, "x.attention.head_count": 4, "x.attention.key_length": 8}
    for change, implied in (
        ({}, {"x.attention.value_length": 16}),
        ({"x.attention.head_count": 0}, {}),
        ({"x.attention.head_count": [4, 0]}, {}),
    ):
        info = GGUFInfo(Path(), {"general.architecture": "x"} | sizes | change, [], 0)
        assert info.implied == implied

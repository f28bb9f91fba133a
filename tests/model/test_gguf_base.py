"""A GGUF file as a base: what the real converter made is undone exactly, and what cannot be is refused by name."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import MODEL_ARCH, GGUFValueType, GGUFWriter, TokenType, get_tensor_name_map
from support import bases
from support.small_models import make_task, scratch
from tokenizers import Tokenizer

from benchmarks.families import FAMILIES
from pipeline.errors import UserError
from pipeline.llamacpp.converter import command, convert
from pipeline.llamacpp.gguf_file import inspect
from pipeline.model import gguf_tokenizer
from pipeline.model.base import resolve_base, rounded_before
from pipeline.model.facts import facts
from pipeline.model.sentencepiece_file import write_sentencepiece
from pipeline.model.weights_file import read_weights
from pipeline.prompt.hostile_strings import hostile_strings
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.stages import data

PHI_3 = FAMILIES["Phi-3"].added
ROTARY = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@cache
def made(name: str, tokenizer: str, model_type: str, kind: str) -> tuple[Path, Path]:
    """A small base and the GGUF file that the converter makes of it."""
    folder = scratch() / f"gguf-{name}"
    shutil.copytree(bases.base(f"gguf-{name}", tokenizer, model_type), folder)
    if model_type == "llama":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": ROTARY}))
    write_sentencepiece(folder)
    target = folder.parent / f"{name}.gguf"
    convert(command(folder, target, kind), target.parent)
    return folder, target


LLAMA = ("llama", "llama2", "llama", "f16")
QWEN = ("qwen", "qwen2_5", "qwen2", "q8_0")


@pytest.mark.parametrize(("given", "said"), [(LLAMA, ""), (QWEN, "rounded to Q8_0 before training")])
def test_what_the_converter_made_is_undone(given: tuple[str, str, str, str], said: str) -> None:
    original, file = made(*given)
    folder = resolve_base(str(file))
    assert resolve_base(str(file)) == folder
    assert said in rounded_before(str(file))
    assert bool(said) == bool(rounded_before(str(file)))

    _same_weights(file, original, folder, exact=not said)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (folder, original))
    differing = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
    assert differing <= {"dtype", "initializer_range"}
    assert facts(str(file)) == facts(str(original))

    texts = hostile_strings(2000, special_tokens=list(saved_tokenizer(folder).all_special_tokens))
    ids = [
        [encoding.ids for encoding in Tokenizer.from_file(str(path / "tokenizer.json")).encode_batch(texts)]
        for path in (original, folder)
    ]
    assert ids[0] == ids[1]
    tokenizer, before = saved_tokenizer(folder), saved_tokenizer(original)
    for name in ("bos_token", "eos_token", "pad_token", "chat_template"):
        assert getattr(tokenizer, name) == getattr(before, name), name


def _same_weights(file: Path, original: Path, folder: Path, *, exact: bool) -> None:
    """The tensors are the file's, dequantized, and those of the model before it was converted."""
    info, ours, theirs = inspect(file), read_weights(folder), read_weights(original)
    assert ours.shapes == theirs.shapes
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    for name in ours.shapes:
        before, after = theirs[name].float().numpy(), ours[name].float().numpy()
        module, _, kind = name.rpartition(".")
        stored = info.names[f"{names.get_name(module)}.{kind}"]
        in_file = info.values(stored).astype(np.float16).astype(np.float32)
        if exact:
            assert np.array_equal(before.astype(np.float16), after), name
        else:  # blocks of 32 share a scale of 127 steps
            assert np.array_equal(in_file, after), name
            assert np.abs(before - after).max() <= np.abs(before).max() / 200, name


def test_a_run_s_data_are_made_with_it(tmp_path: Path) -> None:
    _, file = made(*QWEN)
    rows = [{"prompt": f"Say {number}.", "completion": f"{number} it is."} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make_task(tmp_path / "run", "data", model={"base": str(file)}, data={"train": tmp_path / "rows.jsonl"})
    figures = data.main(task)
    assert figures["train_rows"] + figures["validation_rows"] == 8


def vocabulary_of(original: Path, tokens: int, name: str | None = None) -> Path:
    """A Llama's GGUF file with a folder's tokenizer and no weights."""
    shape = {"max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": tokens, **shape}
    (original / "config.json").write_text(json.dumps(config))
    write_sentencepiece(original)
    file = original.parent / "vocabulary.gguf"
    convert([*command(original, file, "f16", name), "--vocab-only"], original.parent)
    return file


def test_the_digits_of_llama_3_are_split_as_its_own_tokenizer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that llama.cpp is asked: a splitting that is a little wrong is refused."""
    original = bases.tokenizer_files("llama3_1", tmp_path / "base")
    info = inspect(vocabulary_of(original, 128256))
    rebuilt = gguf_tokenizer.tokenizer_of(info)
    gguf_tokenizer.refuse_other_tokens(info, rebuilt)
    texts = hostile_strings(2000, special_tokens=rebuilt.all_special_tokens)
    own = Tokenizer.from_file(str(original / "tokenizer.json"))
    assert rebuilt(texts)["input_ids"] == [encoding.ids for encoding in own.encode_batch(texts)]

    monkeypatch.setitem(gguf_tokenizer.SPLITTINGS, "llama-bpe", gguf_tokenizer.Splitting(whole_words=True, bos=True))
    with pytest.raises(UserError, match="cannot be rebuilt exactly: .* give the original model"):
        gguf_tokenizer.refuse_other_tokens(info, gguf_tokenizer.tokenizer_of(info))


def test_the_tokens_of_a_llama_that_is_named_phi_3_take_the_white_space_after_them(tmp_path: Path) -> None:
    """As many files of Phi-3 are made; the name is all that llama.cpp goes by."""
    original = bases.tokenizer_files("llama2", tmp_path / "base", chat_template=False, added=PHI_3, taking=("rstrip",))
    info = inspect(vocabulary_of(original, 32000 + len(PHI_3), "Phi-3-mini"))
    assert info.architecture == "llama"
    rebuilt = gguf_tokenizer.tokenizer_of(info)
    gguf_tokenizer.refuse_other_tokens(info, rebuilt)
    own = Tokenizer.from_file(str(original / "tokenizer.json"))
    text = "<|user|>\n Hi<|end|> \n<|assistant|>\n"
    assert rebuilt(text)["input_ids"] == own.encode(text).ids
    info.metadata["general.name"] = "mini"
    assert gguf_tokenizer.tokenizer_of(info)(text)["input_ids"] != own.encode(text).ids
    with pytest.raises(UserError, match="cannot be rebuilt exactly"):
        gguf_tokenizer.refuse_other_tokens(info, gguf_tokenizer.tokenizer_of(info))


def written(path: Path, *, architecture: str = "llama", without: str = "", more: str = "", **keys: Any) -> Path:
    """A GGUF file of one block and three tokens, with other keys or tensors."""
    writer = GGUFWriter(path, architecture)
    values = {
        "context_length": 64,
        "block_count": 1,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.eos_token_id": 2,
    }
    for key, value in (values | {key.replace("__", "."): value for key, value in keys.items()}).items():
        name = key if key.startswith(("tokenizer.", "general.", "split.")) else f"{architecture}.{key}"
        kinds = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
        writer.add_key_value(name, value, kinds[type(value)])
    writer.add_token_list(["<unk>", "a", "</s>"])
    writer.add_token_scores([0.0, -1.0, 0.0])
    writer.add_token_types([TokenType.UNKNOWN, TokenType.NORMAL, TokenType.CONTROL])
    block = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    for name in ["token_embd", "output_norm", *(f"blk.0.{part}" for part in block), *([more] if more else [])]:
        if name != without:
            shape = (32,) if "norm" in name or "rope" in name else (3 if name == "token_embd" else 32, 32)
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"architecture": "gemma3"}, "of the architecture gemma3; of a GGUF file llama, qwen2, qwen3 can be: give the"),
        ({"general__type": "adapter"}, "is an adapter, not a model: give the base"),
        ({"general__type": "mmproj"}, "is a projector for images"),
        ({"architecture": "clip"}, "is a projector for images"),
        ({"general__type": "imatrix"}, "holds no model"),
        ({"split__count": 3}, "is one of 3 parts: join them first"),
        ({"expert_count": 8}, "llama.expert_count = 8: such a model cannot be rebuilt: give the original"),
        ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type = yarn"),
        ({"rope__dimension_count": 8}, "llama.rope.dimension_count is 8, and the keys of its 2 heads are 16 wide"),
        ({"without": "blk.0.attn_k"}, "the tensor blk.0.attn_k.weight is missing"),
        ({"more": "blk.0.attn_q_norm"}, "holds blk.0.attn_q_norm.weight, which a plain llama has not"),
        ({"more": "rope_freqs"}, "rope_freqs.weight does not scale positions as Llama 3.1 does"),
        ({"tokenizer__ggml__model": "bert"}, "its tokenizer is of the kind 'bert'"),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "tekken"}, "in the way 'tekken'"),
        ({"tokenizer__ggml__eos_token_id": 7}, "of 3 tokens eos is 7"),
    ],
)
def test_a_file_of_which_no_base_can_be_made(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    file = written(tmp_path / "model.gguf", **given)
    with pytest.raises(UserError) as error:
        resolve_base(str(file))
    assert words in str(error.value)
    assert str(error.value).startswith(f"model.base: {file}")
    assert len(str(error.value).splitlines()) == 1


def test_a_damaged_file(tmp_path: Path) -> None:
    file = written(tmp_path / "model.gguf")
    content = file.read_bytes()
    for damaged, words in (
        (content[:-9], "is cut short"),
        (content[:200], "is cut short"),
        (b"no model" * 9, "not a G"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"model.base: .*{words}"):
            resolve_base(str(file))
    with pytest.raises(UserError, match="model.base: models/none.gguf: no such file"):  # and no hub is asked
        resolve_base("models/none.gguf")
    with pytest.raises(UserError, match="a revision belongs to a hub id"):
        resolve_base(str(file), "main")

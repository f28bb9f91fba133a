"""Which files make up a model, what its tensors are, and the one 16-bit type that every stage gives it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.good_run import CONFIG, config_of, good_run
from support.small_models import make_task

from pipeline.errors import UserError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.model.sixteen_bit_type import sixteen_bit_type
from pipeline.model.weights_file import read_weights, weight_files
from pipeline.stages import convert, merge
from pipeline.verify import logits
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import PASS

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def folder_of(path: Path, tied: bool = False, **types: torch.dtype) -> Path:
    """A folder with a matrix of 4 x 4 for every name."""
    path.mkdir(exist_ok=True)
    tensors = {f"{name}.weight": torch.arange(16.0).reshape(4, 4).to(kind) for name, kind in types.items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return path


def split(folder: Path) -> None:
    """Put the tensors of a folder into two shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    for file, part in zip(SHARDS, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_a_second_copy_is_no_part_of_the_model(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, a=torch.float16, b=torch.float16)
    save_file({"layers.a": torch.ones(9)}, folder / "consolidated.safetensors")
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]
    split(folder)
    assert [path.name for path in weight_files(folder)] == list(SHARDS)
    weights = read_weights(folder)
    assert weights.stored_values == weights.parameters == 32
    assert weights.shapes == {"a.weight": (4, 4), "b.weight": (4, 4)}
    assert weights.size == sum((folder / shard).stat().st_size for shard in SHARDS)
    assert torch.equal(weights["b.weight"], torch.arange(16.0).reshape(4, 4).half())
    (folder / SHARDS[1]).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing \(1 of 2 shards\)"):
        read_weights(folder)


def test_the_file_of_an_adapter(tmp_path: Path) -> None:
    save_file({"lora_A": torch.ones(3)}, tmp_path / "adapter_model.safetensors")
    assert read_weights(tmp_path).types == {"lora_A": "F32"}


def test_a_tied_head_counts_once_and_buffers_do_not(tmp_path: Path) -> None:
    names = {"embed_tokens": torch.float16, "lm_head": torch.float16}
    assert read_weights(folder_of(tmp_path, tied=True, **names)).parameters == 16
    assert read_weights(folder_of(tmp_path, tied=False, **names)).parameters == 32
    assert read_weights(tmp_path).stored_values == 32
    save_file({"a": torch.ones(5), "rotary_emb.inv_freq": torch.ones(7)}, tmp_path / "model.safetensors")
    assert read_weights(tmp_path).parameters == 5


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-3]), lambda path: path.unlink()])
def test_what_cannot_be_read(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(folder_of(tmp_path, a=torch.float16) / "model.safetensors")
    with pytest.raises(UserError, match="cut short or damaged|no weights"):
        read_weights(tmp_path)


def test_other_types_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds I8 weights: they must be stored in 16 or 32 bits"):
        sixteen_bit_type(read_weights(folder_of(tmp_path, a=torch.int8)))


def stored_as(kind: torch.dtype, *, vectors: torch.dtype | None = None, shards: bool = False) -> Callable[[Path], None]:
    """Store a base in other types."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        cast = {name: tensor.to(kind if tensor.ndim > 1 else vectors or kind) for name, tensor in tensors.items()}
        if kind == torch.float32:  # numbers that 16 bits do not hold
            cast = {name: tensor / 3 for name, tensor in cast.items()}
        save_file(cast, folder / "model.safetensors", {"format": "pt"})
        if shards:
            split(folder)

    return change


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        (stored_as(torch.float16), "f16"),
        (stored_as(torch.float32), "bf16"),
        (stored_as(torch.bfloat16, vectors=torch.float32, shards=True), "bf16"),
    ],
    ids=["float16", "float32", "mixed shards"],
)
def test_merge_convert_and_preflight_take_one_type(
    tmp_path: Path, store: Callable[[Path], None], expected: str
) -> None:
    run = tmp_path / "run"
    for stage in ("data", "train", "base"):
        shutil.copytree(good_run() / stage, run / stage)
    store(run / "base")
    sections = {**CONFIG, "model": {"base": str(run / "base")}}

    # What preflight makes of the base; its numbers are those of the base, but for the rounding.
    settings = config_of(good_run()).verify
    base = Artefacts(settings, run / "base", None, {}, tmp_path)
    base.sixteen_bit = base.expected.path
    assert base.sixteen_bit.name == f"again-{expected}.gguf"
    assert {result.verdict for result in logits.check(base)} == {PASS}

    assert merge.main(make_task(run, "merge", **sections))["stored"] == {"f16": "float16", "bf16": "bfloat16"}[expected]
    figures = convert.main(make_task(run, "convert", **sections))
    assert figures["type"] == expected
    assert inspect(run / "convert" / figures["file"]).tensor_types.keys() == {expected, "f32"}

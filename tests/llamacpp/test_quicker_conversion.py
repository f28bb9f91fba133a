"""What is changed in the converter's process changes nothing of what it writes."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import small_base

from pipeline.llamacpp import quicker_conversion
from pipeline.llamacpp.converter import SCRIPTS, command, convert
from pipeline.llamacpp.gguf_file import inspect
from pipeline.llamacpp.programs import source_tree


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose embedding, which is taken in several pieces, begins with every number of bfloat16, NaN among them.

    So does a matrix whose rows the converter puts in another order.
    """
    folder = tmp_path_factory.mktemp("every") / "base"
    shutil.copytree(small_base(converts=True), folder)
    tensors = load_file(folder / "model.safetensors")
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        tensors[name].view(-1)[: len(every)] = every
    assert tensors["model.embed_tokens.weight"].numel() > 3 * quicker_conversion.AT_ONCE
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
def test_the_file_is_that_of_the_script_by_itself(kind: str, base: Path, tmp_path: Path) -> None:
    by_itself, ours = tmp_path / "by-itself.gguf", tmp_path / "ours.gguf"
    subprocess.run(command(base, by_itself, kind), check=True, capture_output=True)
    convert(command(base, ours, kind), tmp_path)
    assert any(tensor.storage.name == kind for tensor in inspect(ours).tensors)
    assert ours.read_bytes() == by_itself.read_bytes()


def test_it_is_what_scripts_convert_with(tmp_path: Path) -> None:
    script, lines = tmp_path / "script.py", list[str]()
    script.write_text(
        f"import sys; sys.path[:0] = {[str(source_tree()), str(source_tree() / 'gguf-py')]}\n"
        "from conversion.base import LazyTorchTensor; print(LazyTorchTensor.numpy.__module__)"
    )
    assert SCRIPTS.run([script], lines.append) == 0
    assert lines == [quicker_conversion.__name__]

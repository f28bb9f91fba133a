"""What a model needs of the memory, against models that are loaded here; and the batches that follow."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from support.small_models import base_folder

from pipeline.figures import GIB
from pipeline.model import memory
from pipeline.model.load import load_float32
from pipeline.model.weights_file import Weights, read_weights
from pipeline.setup import gpu, machine


def test_the_machine_is_asked() -> None:
    assert machine.memory_bytes() == psutil.virtual_memory().total
    assert 0 < machine.free_memory() <= machine.memory_bytes()
    assert (gpu.free_memory() > 0) == torch.cuda.is_available()


def test_float32_is_what_a_loaded_model_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = read_weights(base_folder()).parameters
    held = sum(tensor.nbytes for tensor in load_float32(base_folder()).parameters())
    assert held == 4 * parameters
    assert held < memory.float32_model(parameters) < 1.2 * held
    for free, fits in ((held, False), (1.2 * held, True)):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        assert memory.fits_float32(base_folder()) == fits


def test_a_merge_keeps_two_copies_where_it_measures_both_bases() -> None:
    least = memory.merge_by_peft(1e9, in_float32=False, dequantizes=False)
    assert 2e9 < least < 3e9
    assert memory.merge_by_peft(1e9, in_float32=False, dequantizes=True) - least == 2e9
    assert memory.merge_by_peft(1e9, in_float32=True, dequantizes=True) > 4e9 + 2e9


def llama_8b(folder: Path, layers: int) -> Weights:
    """The headers of Llama 3.1 8B's shapes, with this many layers."""
    (folder / "config.json").write_text("{}")
    layer = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
             "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}  # fmt: skip
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (128256, 4096), "lm_head.weight": (128256, 4096)}
    return Weights(folder, [], shapes=shapes | ends)


def test_a_merge_from_file_to_file_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    small, large = (memory.merge(llama_8b(tmp_path, layers).own_shapes, measures=True) for layers in (1, 32))
    assert small == large
    # torch, the embedding in float32, and the logits of a batch.
    assert 0.6e9 + 2.1e9 + 0.5e9 < large < 5e9
    assert memory.merge(llama_8b(tmp_path, 32).own_shapes, measures=False) < 1e9


def test_fewer_long_answers_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SimpleNamespace(num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_size=4096,
                           num_hidden_layers=32)  # fmt: skip
    config = SimpleNamespace(get_text_config=lambda: text)
    model: Any = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cpu"))
    monkeypatch.setattr(machine, "free_memory", lambda: 8 * GIB)
    assert memory.answers_together(model, 100) == 32
    # 8 billion parameters, Llama's sizes: 128 KiB for each token, so 4 GiB hold 32,768 of them.
    assert memory.answers_together(model, 4096) == 8
    assert memory.answers_together(model, 10**6) == 1
    del text.num_attention_heads
    assert memory.answers_together(model, 10**6) == 32

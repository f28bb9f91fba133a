"""Models as they are loaded: the stored numbers, in the type that the device computes."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.good_run import config_of, good_run

from pipeline.model.load import compute_type, device_for, load_adapter, load_base, load_float32, round_matrices
from pipeline.model.memory import answers_together
from pipeline.model.nf4 import Record, dequantized

MATRIX, VECTOR = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"


def test_the_base_and_the_adapter_on_four_bits() -> None:
    run = good_run()
    settings = config_of(run).model
    device = device_for(0)
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device_for(10**18) == "cpu"
    model, tokenizer = load_base(settings)
    assert model.device.type == device
    assert model.dtype == compute_type(device)
    assert not model.training
    stored = load_file(Path(settings.base) / "model.safetensors")[MATRIX]
    assert torch.equal(model.state_dict()[MATRIX].cpu(), stored.to(model.dtype))

    adapted, trained = load_adapter(settings, run / "train" / "adapter", Record.read(run / "train"))
    assert trained.get_vocab() == tokenizer.get_vocab()
    assert answers_together(adapted, 100) == 32
    layer = adapted.get_submodule("base_model.model.model.layers.0.mlp.down_proj").base_layer
    if device == "cpu":
        seen = dequantized(stored)
        # A float16 base is rounded to the type that is computed in first: a few weights fall to a neighbouring level.
        other = (layer.weight.float() - seen).abs() > 0.01 * seen.abs().max()
        assert other.float().mean() < 0.01
        assert not torch.equal(layer.weight.float(), stored.float())
    else:
        assert layer.weight.dtype == torch.uint8


def test_only_a_float32_models_matrices_are_rounded(tmp_path: Path) -> None:
    base = shutil.copytree(good_run() / "base", tmp_path / "base")
    tensors = {name: tensor.float() / 3 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    model = load_float32(base)
    round_matrices(model, base, "f32")
    assert torch.equal(model.state_dict()[MATRIX], tensors[MATRIX])
    round_matrices(model, base, "bf16")
    assert torch.equal(model.state_dict()[MATRIX], tensors[MATRIX].bfloat16().float())
    assert torch.equal(model.state_dict()[VECTOR], tensors[VECTOR])

    half = load_float32(good_run() / "base")
    before = half.state_dict()[MATRIX].clone()
    round_matrices(half, good_run() / "base", "bf16")
    assert torch.equal(half.state_dict()[MATRIX], before)

"""What NF4 keeps of a mixture, whose experts are packed as one tensor of a layer, and are apart in the files."""

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file
from support.adapters import random_base

from pipeline.model.adapter_file import Renaming
from pipeline.model.load import load_float32
from pipeline.model.nf4 import Kept, Record, dequantize_base, dequantized, restore_base
from pipeline.model.weights_file import read_weights

EXPERTS = ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")
MODULE = "model.layers.0.self_attn.q_proj"
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
RECORD = Record(in_4bit=frozenset({*EXPERTS, MODULE}))


def test_experts_are_unpacked_as_they_were_packed(tmp_path: Path) -> None:
    """From the files as in the loaded model, which is put back as it was."""
    base = random_base(tmp_path / "base", "qwen3_moe", **MIXTURE)
    weights, model = read_weights(base), load_float32(base)
    before: dict[str, torch.Tensor] = {}
    dequantize_base(model, RECORD, before)
    assert before.keys() == RECORD.in_4bit
    model.save_pretrained(tmp_path / "dequantized")
    theirs = load_file(tmp_path / "dequantized" / "model.safetensors")
    kept = Kept(weights, RECORD, Renaming())
    for name, tensor in theirs.items():
        assert (name in kept) == (".layers.1.mlp.experts." in name or name == f"{MODULE}.weight"), name
        assert torch.equal(tensor, kept[name] if name in kept else weights[name].float()), name
    one = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert not torch.equal(kept[one], dequantized(weights[one]))  # as if it had been packed alone
    restore_base(model, before)
    model.save_pretrained(tmp_path / "restored")
    for name, tensor in load_file(tmp_path / "restored" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name].float()), name


def test_the_record_is_of_what_is_packed(tmp_path: Path) -> None:
    """Experts as Unsloth packs them (its moe_utils_bnb4bit.py): a parameter of bitsandbytes, and no module."""
    base = random_base(tmp_path / "base", "qwen3_moe", **MIXTURE)
    model, name = load_float32(base), EXPERTS[1]
    assert Record.of(model) == Record()
    experts = model.get_submodule(name.rpartition(".")[0])
    packed = Params4bit(experts.down_proj.data, requires_grad=False, quant_type="nf4").to("cpu")
    experts.down_proj = packed
    record = Record.of(model)
    assert record == Record(in_4bit=frozenset({name}))
    assert record.experts == [name]
    kept = Kept(read_weights(base), record, Renaming())
    for number, theirs in enumerate(dequantize_4bit(packed.data, packed.quant_state)):
        assert torch.equal(kept[f"model.layers.1.mlp.experts.{number}.down_proj.weight"], theirs)

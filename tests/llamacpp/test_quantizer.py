"""What llama-quantize is asked, and what it says: types, fallbacks, refusals; against the files that it writes."""

from pathlib import Path

import pytest
from support import small_models

from pipeline.errors import UserError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.llamacpp.quantizer import Fallback, Quantization, dry_run, quantization_type, quantization_types, quantize


def test_every_name_in_any_case() -> None:
    types = quantization_types()
    assert len(types) > 30
    for name in types:
        assert quantization_type(name.lower()) == quantization_type(name) == types[name]
    assert quantization_type("q4_k").name == "Q4_K_M"
    assert quantization_type("q8_0").number == 7
    assert quantization_type("bf16").promised_bits == 16
    assert quantization_type("iq4_xs").promised_bits == 4.25


@pytest.mark.parametrize(("name", "near"), [("q4_k_n", "Q4_K_M"), ("q4km", "Q4_K_M"), ("int4", "known are: ")])
def test_an_unknown_name(name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"export\.quant: llama-quantize has no type {name}; .*{near}"):
        quantization_type(name)


def test_a_plan_is_what_is_made(tmp_path: Path) -> None:
    source, target = small_models.converted()[0], tmp_path / "model.gguf"
    done: list[int] = []
    made = quantize(source, target, "q4_k_m", lambda line, tensors: done.append(tensors))
    planned = dry_run(source, "Q4_K_M")
    assert made == planned
    assert made.types == {tensor.name: tensor.type for tensor in inspect(target).tensors}
    assert len(made.fallbacks) == 180
    assert Fallback("blk.0.attn_q.weight", 576, 256, "q4_K", "q5_0") in made.fallbacks
    assert all(made.types[fallback.tensor] == fallback.taken for fallback in made.fallbacks)
    assert made.warnings == []
    assert done == sorted(done)
    assert done[-1] == 272


def test_a_type_that_cannot_be_planned() -> None:
    with pytest.raises(UserError, match=r"export\.quant: Q1_0 cannot store this model: the rows of \S+ \(576\)"):
        dry_run(small_models.converted()[0], "q1_0")


def test_other_warnings_are_kept() -> None:
    said = Quantization()
    for line in (
        "warning: blk.1.x.weight - ncols    100 not divisible by 256 (required for type   iq4_xs) "
        "(WARNING: must use F16 due to unusual shape) -> falling back to     f16",
        "llama_model_quantize_impl: WARNING: 1 of 2 tensor(s) required fallback quantization",
        " warning: something that nobody knows ",
    ):
        said.read(line)
    assert said.fallbacks == [Fallback("blk.1.x.weight", 100, 256, "iq4_xs", "f16")]
    assert said.warnings == ["warning: something that nobody knows"]

"""The quantize stage with the real llama-quantize, and what is said when a type cannot be had."""

import shutil
from pathlib import Path

import pytest
from support import small_models

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.llamacpp.quantizer import quantization_type
from pipeline.run.stage import Task
from pipeline.stages import quantize


def task_on(tmp_path: Path, variant: str, source: Path | None = None) -> Task:
    """A run's folder with a converted model."""
    (tmp_path / "convert").mkdir()
    source = source or small_models.converted()[0]
    (tmp_path / "convert" / source.name).symlink_to(source)
    return small_models.make_task(tmp_path, "quantize", variant)


def test_q4_k_m_and_what_it_is_worth_on_this_model() -> None:
    path, figures, task = small_models.quantized()
    assert path.name == "model-q4_k_m.gguf"
    assert figures["bytes"] == path.stat().st_size
    assert figures["type"] == "Q4_K_M"
    assert figures["promised_bits_per_weight"] == pytest.approx(4.9, abs=0.01)
    assert figures["bits_per_weight"] == pytest.approx(6.17, abs=0.01)
    # Every matrix but the 30 whose rows are 1536 and the embedding, which llama-quantize treats apart.
    assert figures["fallback_tensors"] == 180
    assert figures["fallback_share"] == pytest.approx(0.592, abs=0.001)
    assert figures["tensor_types"]["q5_0"] > figures["tensor_types"]["q4_K"]
    assert sum(figures["parameters_by_type"].values()) == 134_515_008
    [warning] = task.warnings
    assert "180 of 272 tensors (59% of the parameters) fell back" in warning
    assert task.commands == [[task.commands[0][0], str(small_models.converted()[0]), str(path), "Q4_K_M"]]
    assert task.commands[0][0].endswith("llama-quantize")


def test_a_type_that_fits_falls_back_nowhere(tmp_path: Path) -> None:
    task = task_on(tmp_path, "q8_0")
    figures = quantize.main(task)
    assert figures["fallback_tensors"] == 0
    assert figures["bits_per_weight"] == pytest.approx(8.5, abs=0.05)
    assert task.warnings == []


def test_f16_keeps_every_bit(tmp_path: Path) -> None:
    task = task_on(tmp_path, "f16")
    quantize.main(task)
    copied, source = inspect(task.output / "model-f16.gguf"), inspect(small_models.converted()[0])
    for tensor in source.tensors:
        assert (copied.data(copied.names[tensor.name]) == source.data(tensor)).all()


def test_the_variants_are_the_types_of_the_configuration() -> None:
    config = small_models.make_config(export={"quant": ["Q4_K_M", "q8_0", "q4_k_m"]})
    assert quantize.variants(config) == ("q4_k_m", "q8_0")


@pytest.mark.parametrize("name", ["q4_k_n", "iq2_xs"])
def test_a_type_that_cannot_be_made_is_refused_before_anything_runs(name: str) -> None:
    config = small_models.make_config(export={"quant": [name]})
    with pytest.raises(UserError, match=r"export\.quant"):
        quantize.variants(config)


@pytest.mark.parametrize("name", ["iq2_xs", "q1_0"])
def test_a_type_that_this_model_cannot_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"importance matrix|cannot store this model"):
        quantize.main(task_on(tmp_path, name))


def test_a_source_that_is_cut_short(tmp_path: Path) -> None:
    cut = tmp_path / "model-f16.gguf"
    cut.write_bytes(small_models.converted()[0].read_bytes()[:100_000_000])
    with pytest.raises(PipelineError, match="cut short"):
        quantize.main(task_on(tmp_path, "q4_k_m", cut))


def test_a_source_with_nan(tmp_path: Path) -> None:
    source = tmp_path / "model-f16.gguf"
    shutil.copyfile(small_models.converted()[0], source)
    tensor = inspect(source).names["blk.3.attn_q.weight"]
    with source.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff\x7f")
    with pytest.raises(PipelineError, match=r"blk\.3\.attn_q\.weight' has invalid data"):
        quantize.main(task_on(tmp_path, "q4_k_m", source))


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    task = task_on(tmp_path, "q4_k_m")
    (task.output / "model-q4_k_m.gguf").symlink_to("/dev/full")
    with pytest.raises(PipelineError, match="disk is full"):
        quantize.main(task)


def test_no_source_or_two(tmp_path: Path) -> None:
    task = task_on(tmp_path, "q8_0")
    (tmp_path / "convert" / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(PipelineError, match="should hold one GGUF file"):
        quantize.main(task)


def test_a_file_under_another_types_name() -> None:
    source = inspect(small_models.converted()[0])
    result = inspect(small_models.quantized()[0])
    quantize.check_against(result, source, quantization_type("q4_k_m"))
    with pytest.raises(PipelineError, match="general.file_type is 15, not the 10 of Q2_K"):
        quantize.check_against(result, source, quantization_type("q2_k"))
    result.metadata["tokenizer.ggml.eos_token_id"] = 0
    with pytest.raises(PipelineError, match=r"metadata changed by quantizing: tokenizer\.ggml\.eos_token_id"):
        quantize.check_against(result, source, quantization_type("q4_k_m"))

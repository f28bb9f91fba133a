"""Exact logits through libllama, against transformers in float32; and the divergence of what was quantized."""

from pathlib import Path

import numpy as np
import pytest
from support import small_models

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp import perplexity
from pipeline.llamacpp.divergence import Divergence
from pipeline.llamacpp.library import LlamaModel
from pipeline.processes import cores
from pipeline.prompt.hostile_strings import hostile_strings

TEXT = " ".join(
    f"Turn the light in room {number} on, then dim it to {number * 7 % 100} percent." for number in range(90)
)


def test_tokens_are_those_of_transformers() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_models.base_folder())
    texts = hostile_strings(1000, seed=3)
    with LlamaModel(small_models.quantized()[0], context=64) as model:
        assert model.vocabulary_size == len(tokenizer)
        assert model.ends_turn(tokenizer.eos_token_id)
        assert not model.ends_turn(tokenizer.bos_token_id)
        for text in texts:
            assert model.tokenize(text) == tokenizer.encode(text, add_special_tokens=False)


def test_the_converted_file_predicts_what_the_merged_model_does() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with LlamaModel(small_models.converted()[0], context=1024) as model:
        ids = model.tokenize(TEXT)[:600]  # longer than one batch of 512
        found = model.logits(ids)
        assert np.array_equal(found, model.logits(ids)), "the first sequence is forgotten before the second"
        short = model.logits(ids[:40])
    reference = AutoModelForCausalLM.from_pretrained(small_models.base_folder(), dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    divergence = Divergence()
    divergence.add(expected, found)
    assert divergence.positions == 600
    assert divergence.mean < 2e-5
    assert divergence.quantile(0.999) < 1e-3
    assert divergence.largest_lead_lost < 0.01
    assert np.abs(short - found[:40]).max() < 0.1


def test_what_cannot_be_computed(tmp_path: Path) -> None:
    with LlamaModel(small_models.quantized()[0], context=64) as model:
        with pytest.raises(PipelineError, match="a sequence of 65 tokens in a context of 64"):
            model.logits([5] * 65)
        with pytest.raises(PipelineError, match="outside the vocabulary"):
            model.logits([49152])
        with pytest.raises(PipelineError, match="a sequence of 0 tokens"):
            model.logits([])
    with pytest.raises(UserError, match="no such file"), LlamaModel(tmp_path / "nothing.gguf"):
        pass
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small_models.quantized()[0].read_bytes()[:50_000_000])
    with pytest.raises(PipelineError, match="corrupted or incomplete"), LlamaModel(cut):
        pass


def test_llama_perplexity_finds_the_same_divergence(tmp_path: Path) -> None:
    """Two ways to the same figures: llama.cpp's own statistics, and float64 over exact logits."""
    context, chunks = 256, 2
    reference = tmp_path / "reference"
    with LlamaModel(small_models.converted()[0], context=context) as model:
        ids = model.tokenize(TEXT)[: context * chunks]
        positions = perplexity.write_reference(model, ids, reference, context)
        parts = [ids[start : start + context] for start in range(0, len(ids), context)]
        scored = slice(context // 2, context - 1)
        expected = [model.logits(part)[scored] for part in parts]
    ours = Divergence()
    with LlamaModel(small_models.quantized()[0], context=context, exact=False) as model:
        for part, logits in zip(parts, expected, strict=True):
            ours.add(logits, model.logits(part)[scored])

    done: list[float] = []
    theirs = perplexity.compare(small_models.quantized()[0], reference, threads=cores(), on_chunk=done.append)
    assert theirs.positions == positions == ours.positions == 127 * chunks
    assert done[-1] == chunks
    assert theirs.mean == pytest.approx(ours.mean, rel=0.02)
    assert theirs.uncertainty == pytest.approx(ours.statistics.uncertainty, rel=0.1)
    assert theirs.median == pytest.approx(ours.statistics.median, rel=0.1)
    assert theirs.quantile_999 == pytest.approx(ours.quantile(0.999), rel=0.1)
    assert theirs.same_top == pytest.approx(ours.same_top, abs=0.01)
    assert theirs.mean > 0.001

    same = perplexity.compare(small_models.converted()[0], reference, threads=cores())
    assert abs(same.mean) < 2e-5
    assert same.same_top > 0.99


def test_divergence_of_known_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    divergence = Divergence()
    divergence.add(np.log(p).astype(np.float32) + 7, np.log(q).astype(np.float32) - 3)
    assert divergence.mean == pytest.approx((p * np.log(p / q)).sum(), rel=1e-6)
    assert divergence.same_top == 0.0
    assert divergence.largest_lead_lost == pytest.approx(np.log(2), rel=1e-6)
    assert divergence.largest_difference == pytest.approx(np.log(2), rel=1e-6)
    divergence.add(np.log(p).astype(np.float32), np.log(p).astype(np.float32))
    assert divergence.quantile(0.0) == pytest.approx(0.0, abs=1e-12)
    assert divergence.same_top == 0.5
    with pytest.raises(ValueError, match="shape"):
        divergence.add(np.zeros((1, 3), np.float32), np.zeros((1, 4), np.float32))


def test_output_that_cannot_be_read() -> None:
    with pytest.raises(PipelineError, match="gave no"):
        perplexity.parse("nothing of the kind", 10)

"""The divergence of the real Q4_K_M of the packaged base, however few tokens there are to measure it on."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support import small_models

from pipeline.config import Verify
from pipeline.llamacpp.perplexity import LEAST_POSITIONS, scored_positions
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.verify import logits
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import FAIL, PASS
from pipeline.verify.rungs import GGUF_16BIT

TEXT = " ".join(f"Turn the light in room {room} on, then dim it to {room * 7 % 100} percent." for room in range(20))


@pytest.mark.parametrize(("tokens", "positions"), [(150, 150), (250, 124)])
def test_few_held_out_tokens(tmp_path: Path, tokens: int, positions: int) -> None:
    """llama-perplexity, which scores half of the tokens, gives no statistics over fewer than a hundred positions."""
    base = small_models.base_folder()
    ids = saved_tokenizer(base)(TEXT, add_special_tokens=False)["input_ids"][:tokens]
    rows = [(ids[start : start + 100], ids[start : start + 100]) for start in range(0, tokens, 100)]
    assert sum(len(row) for row, _ in rows) == tokens
    quantized = {"q4_k_m": small_models.quantized()[0]}
    artefacts = Artefacts(Verify(), base, small_models.converted()[0], quantized, tmp_path)
    artefacts.held_out = "a text", rows
    results = {result.id: result for result in logits.check(artefacts)}
    assert {result.verdict for result in results.values()} == {PASS}
    found = artefacts.shared["quantized"]["q4_k_m"]
    assert found["positions"] == positions
    assert 0.003 < found["mean"] == results["logits.quantized"].figure < 0.2
    assert found["median"] < found["mean"] < found["quantile_999"] <= found["maximum"]
    assert ("rough" in results["logits.quantized"].words) == (positions < 200)
    assert artefacts.shared["divergences"].keys() == {GGUF_16BIT, "q4_k_m"}
    assert artefacts.shared["divergences"][GGUF_16BIT] < 1e-6
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_too_large_for_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer on one side, the file's own type on the other: still sharp enough for one wrong matrix."""
    monkeypatch.setattr(logits, "fits_float32", lambda folder: False)
    base = small_models.base_folder()
    ids = saved_tokenizer(base)(TEXT, add_special_tokens=False)["input_ids"][:120]
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.20.mlp.up_proj.weight"][:20] *= -1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    for model, verdict in ((base, PASS), (changed, FAIL)):
        artefacts = Artefacts(Verify(), model, small_models.converted()[0], {}, tmp_path)
        artefacts.held_out = "a text", [(ids, ids)]
        results = {result.id: result for result in logits.check(artefacts)}
        assert results["logits.mean"].verdict == verdict, results["logits.mean"].words
        assert "model" not in artefacts.shared or artefacts.shared["model"] is None
    assert not list(tmp_path.glob("*.gguf"))  # no copy in float32


def test_what_llama_perplexity_scores() -> None:
    assert scored_positions(200, 200) == LEAST_POSITIONS - 1
    assert scored_positions(202, 202) == LEAST_POSITIONS
    assert scored_positions(5000, 512) == 9 * 255

"""An adapter that is served on its base, judged like a merged model: and an adapter's file that is another's, found."""

import shutil
from pathlib import Path

import pytest
from support.shared_base import KIND, config_of, run_of

from pipeline.run.layout import Layout
from pipeline.verify import logits, quantization, stopping, token_ids, weights
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import FAIL, NOT_RUN, PASS


@pytest.fixture
def artefacts(tmp_path: Path) -> Artefacts:
    found = Artefacts.of_run(run_of("two"), config_of("two"), tmp_path)
    _, rows = found.held_out
    found.held_out = "the conformance suite", rows[:6]
    return found


def test_every_file_predicts_with_it_what_the_merged_model_predicts(artefacts: Artefacts) -> None:
    assert artefacts.gguf_adapter == Layout(run_of("two")).gguf_adapter
    results = {result.id: result for result in logits.check(artefacts)}
    assert {result.verdict for result in results.values()} == {PASS}, results
    assert results["logits.mean"].figure < 1e-9  # every scaling is the trained one
    assert "before the merge rounded it" in results["logits.mean"].words
    assert 1e-5 < results["logits.quantized"].figure < 0.05


def test_the_files_are_judged_as_those_of_the_base(artefacts: Artefacts) -> None:
    results = [
        *weights.check_sixteen_bit(artefacts),
        *token_ids.check_files(artefacts),
        *quantization.check(artefacts),
        *stopping.check(artefacts),
    ]
    assert {result.verdict for result in results} == {PASS, NOT_RUN}
    assert {result.id for result in results if result.verdict == NOT_RUN} == {"stopping.ollama"}
    assert {"weights.gguf", "tokenizer.ids", "quantization.error", "stopping.llamacpp"} <= {r.id for r in results}


def test_the_file_of_another_adapter_is_found(artefacts: Artefacts, tmp_path: Path) -> None:
    artefacts.gguf_adapter = tmp_path / "adapter.gguf"
    shutil.copyfile(Layout(run_of("one")).gguf_adapter, artefacts.gguf_adapter)
    verdicts = {result.id: result.verdict for result in logits.check(artefacts)}
    assert verdicts["logits.mean"] == verdicts["logits.top"] == FAIL
    artefacts.gguf_adapter.write_bytes(b"GGUF" + bytes(40))
    verdicts = {result.id: result.verdict for result in logits.check(artefacts)}
    assert verdicts["logits.mean"] == verdicts["logits.quantized"] == FAIL
    assert Layout(run_of("two")).quantized(KIND).is_file()

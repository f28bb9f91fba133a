"""A small base of what tutorials use, from `pipeline run` to an answer in Ollama.

benchmarks/families.py takes 25 families this way, minutes each; here is the one with the most quirks: stored in 4 bits,
raw, without a chat template and without a pad token.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest
from support.page import Page

from benchmarks.families import FAMILIES, project, whole_way
from benchmarks.program import COMMAND
from pipeline.config import Config
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import PASS
from pipeline.verify.trained_labels import check as check_labels


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return project(tmp_path_factory.mktemp("whole") / "llama", FAMILIES["Llama 2 in 4 bits (bitsandbytes)"])
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


def test_a_raw_llama_in_4_bits(config: Path, tmp_path: Path) -> None:
    """What is saved says no more of its tokens than the base did; merged into what its weights unpack to."""
    from transformers import AutoTokenizer

    found = whole_way(config)
    assert found["failed"] == [], found["output"]
    assert found["status"] == 0, found["output"]
    assert found["checks"][PASS] > 60

    run = config.parent / "run"
    chosen = json.loads((run / "merge" / "base.json").read_text())
    assert (chosen["taken"], chosen["why"]) == ("dequantized", "the base is stored in 4 bits")
    base = AutoTokenizer.from_pretrained(config.parent / "base")
    assert base.pad_token is None
    assert base.chat_template is None
    artefacts = Artefacts.of_run(run, Config.model_validate_json((run / "config.json").read_text()), tmp_path)
    assert {result.verdict for result in check_labels(artefacts)} == {PASS}
    batches = [json.loads(line) for line in (run / "train" / "batches.jsonl").read_text().splitlines()]
    assert len({len(ids) for batch in batches for ids in batch["input_ids"]}) > 1  # there was something to pad
    for folder in (run / "train" / "adapter", run / "merge" / "model"):
        saved = AutoTokenizer.from_pretrained(folder)
        for token in ("pad_token", "eos_token", "bos_token"):
            assert getattr(saved, token) == getattr(base, token), token
        text = saved.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text == "<s><|user|>\nHi</s>\n"
        assert saved.get_vocab() == base.get_vocab()
    assert json.loads((run / "merge" / "model" / "config.json").read_text()).get("pad_token_id") is None


def test_a_broken_link_ends_the_command(config: Path) -> None:
    """A limit that no quantized file keeps stands for a file that is broken."""
    command = [*COMMAND, "run", str(config), "--set", "verify.quantized_divergence=1e-9"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert "the first broken stage is quantize/q4_k_m: logits.quantized: mean KL" in answer.stderr
    assert re.search(r"logits\.quantized +quantize/q4_k_m +fail", answer.stdout)
    assert "labels.spans" not in answer.stdout
    page = Page.of(config.parent / "run" / "report" / "report.html")
    assert "The first broken stage is quantize/q4_k_m: mean KL" in page.text
    page.shows_the_proof(config.parent / "run")

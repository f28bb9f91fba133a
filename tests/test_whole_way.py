"""Small bases from `pipeline run` to an answer in Ollama; benchmarks/families.py has all families."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import servers

from benchmarks.families import FAMILIES, project, whole_way
from pipeline.config import Config
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import PASS
from pipeline.verify.trained_labels import check as check_labels


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    servers.ollama()  # there is one
    return tmp_path_factory.mktemp("families")


def taken(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Take a family the whole way; its run's folder, and what came out. Every check passes."""
    try:
        config = project(folder / name, FAMILIES[name])
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    found = whole_way(config)
    assert found["failed"] == [], found["output"]
    assert found["status"] == 0, found["output"]
    assert found["checks"][PASS] > 60
    return config.parent / "run", found


def test_a_raw_llama_without_pad_token(folders: Path) -> None:
    """With a template that it never had; what is saved says no more of its tokens than the base did."""
    from transformers import AutoTokenizer

    run, _ = taken(folders, "Llama 3.1, raw")
    base = AutoTokenizer.from_pretrained(run.parent / "base")
    assert base.pad_token is None
    assert base.chat_template is None
    artefacts = Artefacts.of_run(run, Config.model_validate_json((run / "config.json").read_text()), folders)
    assert {result.verdict for result in check_labels(artefacts)} == {PASS}
    batches = [json.loads(line) for line in (run / "train" / "batches.jsonl").read_text().splitlines()]
    assert len({len(ids) for batch in batches for ids in batch["input_ids"]}) > 1  # there was something to pad
    for folder in (run / "train" / "adapter", run / "merge" / "model"):
        saved = AutoTokenizer.from_pretrained(folder)
        for token in ("pad_token", "eos_token", "bos_token"):
            assert getattr(saved, token) == getattr(base, token), token
        assert "<|user|>" in saved.chat_template
        assert saved.get_vocab() == base.get_vocab()
    assert json.loads((run / "merge" / "model" / "config.json").read_text()).get("pad_token_id") is None


def test_a_base_in_4_bits(folders: Path) -> None:
    """Merged into what its weights unpack to, which is what the adapter saw."""
    run, _ = taken(folders, "Llama 2 in 4 bits (bitsandbytes)")
    chosen = json.loads((run / "merge" / "base.json").read_text())
    assert (chosen["taken"], chosen["why"]) == ("dequantized", "the base is stored in 4 bits")


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("Phi-3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("GPT-2", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_other_architectures(folders: Path, name: str, modules: set[str]) -> None:
    """Fused projections; transposed matrices."""
    run, _ = taken(folders, name)
    figures = json.loads((run / "manifest.json").read_text())["stages"]["data"]["figures"]
    assert set(figures["adapter_modules"]) == modules

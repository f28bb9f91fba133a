"""EOS, BOS and padding, said in three files of one folder: a contradiction is a failure, several ends are none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.adapters import TOKENIZER, small_base

from pipeline.config import Verify
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import FAIL, PASS, Result
from pipeline.verify.special_tokens import check


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder without its weights, which are not read."""
    for name in ("config.json", "generation_config.json", *TOKENIZER):
        shutil.copy(small_base(converts=True) / name, tmp_path / name)
    return tmp_path


def judged(folder: Path) -> dict[str, Result]:
    return {result.id.rpartition(".")[2]: result for result in check(Artefacts(Verify(), folder, None, {}, folder))}


def settings(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def never_ends(folder: Path) -> None:
    settings(folder / "generation_config.json", eos_token_id=0)


def never_ends_without_a_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    settings(folder / "config.json", eos_token_id=[0, 5])


def no_such_token(folder: Path) -> None:
    settings(folder / "config.json", eos_token_id=128_009)


def another_beginning(folder: Path) -> None:
    settings(folder / "config.json", bos_token_id=5)


def another_padding(folder: Path) -> None:
    settings(folder / "generation_config.json", pad_token_id=7)


@pytest.mark.parametrize(
    ("damage", "which", "said"),
    [
        (never_ends, "eos", "generation_config.json: eos_token_id = 0 ("),
        (never_ends_without_a_generation_config, "eos", "config.json: eos_token_id = 0 ("),
        (no_such_token, "eos", "config.json: eos_token_id = 128,009, and the tokenizer has 49,152 tokens"),
        (another_beginning, "bos", "config.json: bos_token_id = 5 ("),
        (another_padding, "pad", "generation_config.json: pad_token_id = 7 ("),
    ],
)
def test_a_contradiction_is_named(folder: Path, damage: Callable[[Path], None], which: str, said: str) -> None:
    damage(folder)
    results = judged(folder)
    assert {name for name, result in results.items() if result.verdict == FAIL} == {which}
    assert said in results[which].words


def test_more_ends_than_one_are_no_contradiction(folder: Path) -> None:
    assert {result.verdict for result in judged(folder).values()} == {PASS}
    settings(folder / "generation_config.json", eos_token_id=[2, 0])
    settings(folder / "config.json", eos_token_id=0)
    assert {result.verdict for result in judged(folder).values()} == {PASS}

"""The model card of an adapter: its front matter says what was meant, and its page shows texts as they are."""

from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from support.small_models import make_config

from pipeline.defaults import Facts, resolve
from pipeline.model.card import plain, write_model_card

LOSSES = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
VALIDATION = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "eval_loss": 1.5}, {"step": 2, "eval_loss": 1.75}]


def card(folder: Path, **sections: dict[str, object]) -> str:
    config, _ = resolve(make_config(**sections), {}, Facts(135_000_000, 2048, None))
    write_model_card(folder / "README.md", config, ["x|y", "q_proj"], LOSSES + VALIDATION, kept=1)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "base",
    [
        "owner/model_v2",
        '/models/"a": [b] # c',
        "/models/---\n---\nlicense: mit",
        "/models/\N{GRINNING FACE} é\u2028\x85 & <b>",
        "no",
    ],
)
def test_the_front_matter_names_the_base_whatever_it_is_called(tmp_path: Path, base: str) -> None:
    text = card(tmp_path, model={"base": base})
    assert metadata_load(tmp_path / "README.md") == {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft", "unsloth", "trl"],
    }
    assert f"\n---\n\n# LoRA adapter for {plain(base)}\n" in text


def test_the_table_has_the_figures_and_two_cells_a_row(tmp_path: Path) -> None:
    text = card(tmp_path, model={"base": "a|b", "revision": "c|d"})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3}
    assert r"| base | a\|b at c\|d |" in rows
    assert r"| modules | x\|y, q\_proj |" in rows
    assert "| training loss | 2.0000 to 1.0000 |" in rows
    assert "| validation loss | 3.0000 to 1.5000 |" in rows
    assert "steps | 2 (the adapter of step 1 is kept), batch 8 x 1" in text


def test_plain_text_in_markdown() -> None:
    assert plain("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    assert plain("a_b*c*\n<script> `x` [y](z) \\") == r"a\_b\*c\* \<script\> \`x\` \[y\](z) \\"

"""What is asked at a rung: the context holds it, and the time decides how much of it."""

import json
from pathlib import Path

import pytest
from support import small_models

from pipeline.data.questions import Question
from pipeline.model.merge_target import chosen_base
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.prompt.template import ChatTemplate
from pipeline.run.layout import Layout
from pipeline.stages import evaluate
from pipeline.stages.evaluate import TABLE, answerer_at_rung
from pipeline.verify import answers
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.rungs import ADAPTER_16BIT, GGUF_16BIT


@pytest.mark.parametrize("stored_in_4bit", [False, True])
@pytest.mark.parametrize(
    ("load_in_4bit", "merge_base"),
    [(False, "auto"), (False, "16bit"), (True, "auto"), (True, "16bit"), (True, "dequantized")],
)
def test_the_rungs_that_are_asked_are_those_that_verify_looks_at(
    tmp_path: Path, stored_in_4bit: bool, load_in_4bit: bool, merge_base: str
) -> None:
    """The adapter is asked on two bases where it was trained on the NF4 of 16 bits, and nowhere else."""
    base = tmp_path / "base"
    base.mkdir()
    stored = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}} if stored_in_4bit else {}
    (base / "config.json").write_text(json.dumps({"model_type": "llama"} | stored))
    config = small_models.make_config(
        model={"base": str(base)},
        data={"train": "train.jsonl", "test": "test.jsonl"},
        train={"load_in_4bit": load_in_4bit},
        merge={"base": merge_base},
    )
    *asked, table = evaluate.variants(config)
    assert table == TABLE
    assert (ADAPTER_16BIT in asked) == (load_in_4bit and not stored_in_4bit)
    for rung in {*asked, ADAPTER_16BIT}:  # the last may be left from another configuration
        path = Layout(tmp_path).answers(rung)
        path.parent.mkdir(parents=True)
        path.write_text('{"correct": true}\n')
    artefacts = Artefacts(config.verify, base, None, {}, tmp_path, run=tmp_path, config=config)
    assert all(answers.check(artefacts))
    assert list(artefacts.shared["answers"]) == asked
    measured = load_in_4bit and not stored_in_4bit and merge_base == "auto"
    assert (chosen_base(config) is None) == measured


def question(words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "hello " * words}]


def test_a_gguf_file_is_asked_without_what_llamacpp_adds(tmp_path: Path) -> None:
    """Its date, and that the model is to think: this template ends at either."""
    made = small_models.make_task(tmp_path, "evaluate", "q4_k_m", eval={"max_new_tokens": 1})
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "model").symlink_to(small_models.base_folder())
    (tmp_path / "quantize" / "q4_k_m").mkdir(parents=True)
    added = "date_string is defined or (enable_thinking is defined and enable_thinking)"
    source = f"{{% if {added} %}}{{{{ raise_exception('added') }}}}{{% endif %}}{{{{ messages[0].content }}}}"
    write_scratch_model(tmp_path / "quantize" / "q4_k_m" / "model-q4_k_m.gguf", ChatTemplate(source))
    asked = [Question(question(1), "hi")]
    with answerer_at_rung(made, asked) as answer:
        assert answer is not None
        assert len(answer(asked, lambda done: None)) == 1


@pytest.mark.parametrize(("minutes", "asked"), [(1e-9, 8), (1000.0, 12)])
def test_the_time_decides_how_many_are_asked(tmp_path: Path, minutes: float, asked: int) -> None:
    """And what could not be asked at one rung is not compared there."""
    (tmp_path / "data").mkdir()
    rows = [{"messages": [*question(number), {"role": "assistant", "content": "hi"}]} for number in range(1, 13)]
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "model").symlink_to(small_models.base_folder())
    (tmp_path / "convert").mkdir()
    write_scratch_model(tmp_path / "convert" / "model-f16.gguf", ChatTemplate("{{ messages[0].content }}"))
    shared = {"max_new_tokens": 1, "minutes": minutes, "metric": "text"}
    sections = {"eval": shared, "export": {"quant": ["q4_k_m"]}, "data": {"train": "train.jsonl", "test": "test.jsonl"}}
    quick = small_models.make_task(tmp_path, "evaluate", GGUF_16BIT, **sections)
    assert evaluate.main(quick)["asked"] == asked
    assert any(f"allowed {asked} of 12 questions" in text for text in quick.warnings) == (asked < 12)
    path = Layout(tmp_path).answers("q4_k_m")
    path.parent.mkdir(parents=True)
    path.write_text('{"expected": "hi", "answer": "hi", "correct": true}\n' * 12)
    table = small_models.make_task(tmp_path, "evaluate", TABLE, **sections)
    evaluate.main(table)
    document = json.loads(table.layout.evaluation.read_text())
    assert [len(row["answers"]) for row in document["rows"]] == [2] * asked + [1] * (12 - asked)
    assert document["rungs"][GGUF_16BIT]["asked"] == asked

"""What is asked at a rung: the context holds it, and the time decides how much of it."""

import json
from pathlib import Path

import pytest
from support import small_models

from pipeline.data.questions import Question
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.prompt.template import ChatTemplate
from pipeline.run.layout import Layout
from pipeline.stages import evaluate
from pipeline.stages.evaluate import TABLE, answerer_at_rung
from pipeline.verify.rungs import GGUF_16BIT


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
    answers = Layout(tmp_path).answers("q4_k_m")
    answers.parent.mkdir(parents=True)
    answers.write_text('{"expected": "hi", "answer": "hi", "correct": true}\n' * 12)
    table = small_models.make_task(tmp_path, "evaluate", TABLE, **sections)
    evaluate.main(table)
    document = json.loads(table.layout.evaluation.read_text())
    assert [len(row["answers"]) for row in document["rows"]] == [2] * asked + [1] * (12 - asked)
    assert document["rungs"][GGUF_16BIT]["asked"] == asked

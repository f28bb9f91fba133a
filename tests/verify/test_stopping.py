"""stopping: the questions are those that were trained, and a template's refusal of one is no broken file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import small_models

from pipeline.config import Verify
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.prompt.template import ChatTemplate
from pipeline.verify import stopping
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import NOT_RUN, PASS, Result

TOOL = {"type": "function", "function": {"name": "lamp", "parameters": {}}}
TURNS = [{"role": "user", "content": "Light!"}, {"role": "assistant", "content": "On."}]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
WANTS_TOOLS = "{% if not tools %}{{ raise_exception('wants tools') }}{% endif %}"


@pytest.fixture
def judged(tmp_path: Path) -> Any:
    """Judge a template on rows: a scratch model answers, of which no answer has to stop."""

    def judge(template: str, rows: Sequence[dict[str, Any]]) -> Result:
        (tmp_path / "data").mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / "train.jsonl").write_text(text, encoding="utf-8")
        files = {"q8_0": write_scratch_model(tmp_path / "scratch.gguf", ChatTemplate(template))}
        settings = Verify(stopping=0)
        artefacts = Artefacts(settings, small_models.base_folder(), None, files, tmp_path, run=tmp_path)
        artefacts.template = ChatTemplate(template)
        result, ollama = stopping.check(artefacts)
        assert ollama.verdict == NOT_RUN
        return result

    return judge


def test_a_question_is_asked_with_the_tools_that_it_was_trained_with(judged: Any) -> None:
    result = judged(WANTS_TOOLS + PLAIN, [{"messages": TURNS, "tools": [TOOL]}] * 2)
    assert result.verdict == PASS
    assert " of 2 answers ended" in result.words
    assert "refuses" not in result.words


def test_a_refusal_is_told_with_its_row_and_the_others_are_asked(judged: Any) -> None:
    system = {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}
    result = judged(NO_SYSTEM + PLAIN, [{"messages": TURNS}, system])
    assert result.verdict == PASS
    assert " of 1 answers ended" in result.words
    assert "train.jsonl:2: the model's chat template refuses a conversation of (system, user): no" in result.words


def test_what_cannot_be_asked_at_all_did_not_run(judged: Any) -> None:
    result = judged(WANTS_TOOLS + PLAIN, [{"messages": TURNS}])
    assert result.verdict == NOT_RUN
    assert "train.jsonl:1: " in result.words
    assert "wants tools" in result.words

"""The context that a GGUF file is served with: the longest question and its answer fit, or it is said."""

from pathlib import Path

from support import small_models

from pipeline.data.questions import Question
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.prompt.template import ChatTemplate
from pipeline.stages.evaluate import answerer_at_rung, context_for


def question(words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "hello " * words}]


def test_the_longest_question_and_its_answer_fit() -> None:
    folder = small_models.base_folder()  # its context is 8,192 tokens
    short, longer = (context_for(folder, [question(5), question(words)], 100) for words in (5, 3000))
    assert 100 < short < 200
    assert longer == short + 2995


def test_the_context_is_never_longer_than_the_model_s() -> None:
    assert context_for(small_models.base_folder(), [question(8000)], 4000) == 8192


def test_a_gguf_file_is_asked_without_what_llamacpp_adds(tmp_path: Path) -> None:
    """Its date, and that the model is to think: this template ends at either."""
    made = small_models.make_task(tmp_path, "evaluate", "q4_k_m", eval={"max_new_tokens": 1})
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "model").symlink_to(small_models.base_folder())
    (tmp_path / "quantize" / "q4_k_m").mkdir(parents=True)
    added = "date_string is defined or (enable_thinking is defined and enable_thinking)"
    source = f"{{% if {added} %}}{{{{ raise_exception('added') }}}}{{% endif %}}{{{{ messages[0].content }}}}"
    write_scratch_model(tmp_path / "quantize" / "q4_k_m" / "model-q4_k_m.gguf", ChatTemplate(source))
    with answerer_at_rung(made, [Question(question(1), "hi")]) as answer_all:
        assert answer_all is not None
        assert len(answer_all(lambda done: None)) == 1

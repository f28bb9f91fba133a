"""The context that a GGUF file is served with: the longest question and its answer fit, or it is said."""

import artefacts

from pipeline.stages.evaluate import context_for


def question(words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "hello " * words}]


def test_the_longest_question_and_its_answer_fit() -> None:
    folder = artefacts.base_folder()  # its context is 8,192 tokens
    short, longer = (context_for(folder, [question(5), question(words)], 100) for words in (5, 3000))
    assert 100 < short < 200
    assert longer == short + 2995


def test_the_context_is_never_longer_than_the_model_s() -> None:
    assert context_for(artefacts.base_folder(), [question(8000)], 4000) == 8192

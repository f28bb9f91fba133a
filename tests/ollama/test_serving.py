"""The context that a GGUF file is served with."""

from support import small_models

from pipeline.data.questions import Question
from pipeline.ollama.serving import context_for
from pipeline.prompt.tokenizer import saved_tokenizer

TOOL = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}


def question(words: int) -> Question:
    return Question([{"role": "user", "content": "hello " * words}], "hi")


def test_the_longest_question_and_its_answer_fit() -> None:
    tokenizer = saved_tokenizer(small_models.base_folder())
    short, longer = (context_for(tokenizer, [question(5), question(words)], 100, 8192) for words in (5, 3000))
    assert 100 < short < 200
    assert longer == short + 2995
    assert context_for(tokenizer, [question(5)], 100, None) == short
    assert context_for(tokenizer, [question(8000)], 4000, 8192) == 8192

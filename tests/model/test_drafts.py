"""Answers found with drafts are the answers that decoding writes, whatever the drafts say."""

from typing import Any

import torch
from support.good_run import conversations, good_run
from support.small_models import base_folder

from pipeline.model.drafts import draft
from pipeline.model.generate import answer_in_batches, answers
from pipeline.model.load import load_float32
from pipeline.prompt.tokenizer import saved_tokenizer

QUESTIONS = (
    "What is the capital of France? Answer in one word.",
    "Say hello.",
    "What is 2 + 2?",
    "Tell me a long story about the sea.",
)


def test_answers_are_the_same_with_right_wrong_and_mixed_drafts_and_where_memory_runs_out() -> None:
    model, tokenizer = load_float32(base_folder()), saved_tokenizer(base_folder())
    questions = [[{"role": "user", "content": question}] for question in QUESTIONS]
    limit = 20
    counts: list[float] = []
    written = answer_in_batches(model, tokenizer, questions, limit, lambda done: None)

    def run_out(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if len(inputs["input_ids"]) > 1:
            torch.empty(2**52)

    hook = model.register_forward_pre_hook(run_out, with_kwargs=True)
    counts = []
    assert answer_in_batches(model, tokenizer, questions, limit, counts.append) == written, "one by one is the same"
    assert counts == [1, 2, 3, 4]
    hook.remove()
    wrong = ["nothing of the kind"] * len(questions)
    mixed = [*written[:1], *wrong[:1], *written[2:]]
    for drafts, accepted in ((written, True), (wrong, False), (mixed, True)):
        counts = []
        assert answers(model, tokenizer, questions, drafts, limit, counts.append) == written
        # What is decoded is one batch; an earlier count is a draft that was taken. The story's never is: it has no end.
        assert any(count < len(questions) for count in counts) == accepted
        assert counts[-1] == len(questions)


def test_a_draft_is_what_is_trained() -> None:
    tokenizer = saved_tokenizer(good_run() / "merge" / "model")
    (row,) = conversations(3, 1)
    *question, answer = row["messages"]
    made = draft(tokenizer, question, answer["content"])
    assert made is not None
    assert tokenizer.decode(made.answer) == answer["content"] + "<|im_end|>"
    assert tokenizer.decode(made.ids[: made.start]).endswith("<|im_start|>assistant\n")

"""Answers from transformers models: the rungs of the ladder that stand before the GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.errors import PipelineError
from pipeline.model import memory
from pipeline.model.drafts import draft, would_be_written
from pipeline.model.predict import predict
from pipeline.prompt.labels import tokenize_prompt


def answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Sequence[dict[str, Any]]],
    expected: Sequence[str],
    max_new_tokens: int,
    update: Callable[[float], None],
) -> list[str]:
    """Greedy answers of a trained model, in the order of the questions: `answer_in_batches`, made faster by drafts.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer, with the chat template.
        questions: conversations that end where the assistant speaks.
        expected: what the model was trained to say.
        max_new_tokens: longest answer.
        update: called with the number of answers that are done.
    """
    drafts = [draft(tokenizer, question, answer) for question, answer in zip(questions, expected, strict=True)]
    stop = _stop_tokens(model, tokenizer)
    tried = sorted(
        ((place, guess) for place, guess in enumerate(drafts) if guess and guess.ends_in(stop, max_new_tokens)),
        key=lambda pair: len(pair[1].ids),
    )
    found: dict[int, str] = {}
    for (place, guess), logits in zip(tried, predict(model, [guess.ids for _, guess in tried]), strict=True):
        if would_be_written(guess, logits):
            found[place] = tokenizer.decode(guess.answer, skip_special_tokens=True)
            update(len(found))
    left = [place for place in range(len(drafts)) if place not in found]
    written = answer_in_batches(
        model, tokenizer, [questions[place] for place in left], max_new_tokens, lambda done: update(len(found) + done)
    )
    found |= dict(zip(left, written, strict=True))
    return [found[place] for place in range(len(drafts))]


def answer_in_batches(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Sequence[dict[str, Any]]],
    max_new_tokens: int,
    update: Callable[[float], None],
) -> list[str]:
    """Greedy answers, in the order of the questions, half as many at once whenever memory runs out.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer, with the chat template.
        questions: conversations that end where the assistant speaks.
        max_new_tokens: longest answer.
        update: called with the number of answers that are done.
    """
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    ids = [tokenize_prompt(tokenizer, question) for question in questions]
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    texts = [""] * len(ids)
    greedy = _greedy(model, tokenizer, max_new_tokens)
    done = 0
    # Those of similar length go together.
    batch = memory.answers_together(model, max(map(len, ids), default=0) + max_new_tokens)
    with torch.inference_mode():
        while done < len(order):
            places = order[done : done + batch]
            width = max(len(ids[place]) for place in places)
            padded = torch.full((len(places), width), tokenizer.pad_token_id or 0)
            mask = torch.zeros_like(padded)
            for row, place in enumerate(places):
                padded[row, width - len(ids[place]) :] = torch.tensor(ids[place])
                mask[row, width - len(ids[place]) :] = 1
            try:
                output = model.generate(
                    input_ids=padded.to(model.device), attention_mask=mask.to(model.device), generation_config=greedy
                )
            except RuntimeError as error:
                if len(places) == 1 or not should_reduce_batch_size(error):
                    raise
                batch = len(places) // 2  # the memory that was free is not: others use it too
                continue
            for row, place in enumerate(places):
                texts[place] = tokenizer.decode(output[row, width:], skip_special_tokens=True)
            done += len(places)
            update(done)
    return texts


def stream_answer(model: Any, tokenizer: Any, messages: list[dict[str, Any]], max_new_tokens: int) -> Iterator[str]:
    """A greedy answer, piece by piece.

    Raises:
        PipelineError: the model cannot answer.
    """
    from threading import Thread

    import torch
    from transformers import TextIteratorStreamer

    ids = torch.tensor([tokenize_prompt(tokenizer, messages)]).to(model.device)
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[Exception] = []

    def generate() -> None:
        try:
            greedy = _greedy(model, tokenizer, max_new_tokens)
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=pieces, generation_config=greedy)
        except Exception as error:
            failures.append(error)
            pieces.on_finalized_text("", stream_end=True)  # else its reader waits for ever

    thread = Thread(target=generate, daemon=True)
    thread.start()
    yield from pieces
    thread.join()
    if failures:
        raise PipelineError(f"the model cannot answer: {type(failures[0]).__name__}: {failures[0]}") from failures[0]


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    """A configuration of its own: the base's may ask for sampling or penalties, and the answers must be greedy."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=_stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id or 0,
    )


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    own = model.generation_config.eos_token_id
    stop = own if isinstance(own, list) else [own]
    return sorted({token for token in (*stop, tokenizer.eos_token_id) if token is not None})

"""Labels: what is trained is what the model has to write, for tokenizers and templates of every kind."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.prompt.labels import (
    IGNORED,
    Tokenized,
    decode,
    leading_bos,
    tokenize_conversation,
    tokenize_prompt,
    tokenize_texts,
    trained_parts,
    training_texts,
)
from pipeline.prompt.template import render

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An earlier answer ends in another token than the last one, as in the Harmony format.
REWRITES_HISTORY = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{{ '<|endoftext|>' if loop.last and message.role == 'assistant' else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS = CHATML.replace("message.content", "message.content | trim")
EMPTY_THOUGHT = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
OPEN_THOUGHT = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
NO_END_OF_TURN = CHATML.replace("<|im_end|>", "")
WRITES_BOS = "{{ bos_token }}" + CHATML

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi 你好"},
    {"role": "assistant", "content": "Hello 👨‍👩‍👧 é ﷽!"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "  Bye\n\n"},
]
CORPUS = ["Hello there, good bye and hi again.\n\nWhat? And so on. 你好 👨‍👩‍👧\n\n\n"] * 20


@cache
def tokenizer(kind: str, template: str = CHATML, adds_bos: bool = False) -> Any:
    """A small tokenizer, really trained: byte-level BPE as in GPT-2, or with byte fallback as in Llama 2."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<s>", "<|endoftext|>"]
    if kind == "byte-level":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *special]
        alphabet = []
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    )
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    made.chat_template = template
    return made


@pytest.fixture(scope="session", params=["smollm2", "qwen3", "llama3_1", "gemma3"])
def real(request: pytest.FixtureRequest) -> Any:
    """A real family's tokenizer, as far as set-up has fetched it."""
    from transformers import AutoTokenizer

    from pipeline.errors import PipelineError
    from pipeline.setup.places import tokenizer_folder

    folder: Path | None
    if request.param == "smollm2":
        from pipeline.model.base import resolve_base

        try:
            folder = resolve_base("smollm2-135m-instruct")
        except PipelineError:
            folder = None
    else:
        folder = tokenizer_folder(request.param)
    if folder is None:
        pytest.skip(f"the tokenizer of {request.param} is not here: `pipeline setup --dev` fetches it")
    return AutoTokenizer.from_pretrained(folder)


def rows_of(tokenizer: Any, messages: list[dict[str, Any]]) -> list[Tokenized]:
    return tokenize_texts(tokenizer, training_texts(tokenizer, messages))


def check_row(tokenizer: Any, row: Tokenized) -> None:
    """What holds for every row, whatever the template."""
    assert len(row.input_ids) == len(row.labels)
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    assert 0 < row.trained < len(row.input_ids)
    assert leading_bos(tokenizer, row.input_ids) <= 1


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_the_answers_and_their_end_of_turn_tokens_are_trained_and_nothing_else(kind: str) -> None:
    (row,) = rows_of(tokenizer(kind), CHAT[:3])
    assert trained_parts(tokenizer(kind), row) == ["Hello 👨‍👩‍👧 é ﷽!<|im_end|>"]
    end = tokenizer(kind).convert_tokens_to_ids("<|im_end|>")
    assert [label for label in row.labels if label != IGNORED][-1] == end
    assert row.labels[-1] == IGNORED  # the line break that the template writes after it
    assert decode(tokenizer(kind), row.input_ids) == render(tokenizer(kind), CHAT[:3])


def test_every_answer_of_a_conversation_is_trained_in_one_row() -> None:
    (row,) = rows_of(tokenizer("byte-level"), CHAT)
    assert trained_parts(tokenizer("byte-level"), row) == [
        "Hello 👨‍👩‍👧 é ﷽!<|im_end|>",
        "  Bye\n\n<|im_end|>",
    ]


def test_the_served_prompt_is_what_stands_before_the_answer() -> None:
    for kind in ("byte-level", "byte-fallback"):
        (row,) = rows_of(tokenizer(kind), CHAT[:3])
        prompt = tokenize_prompt(tokenizer(kind), CHAT[:2])
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[: len(prompt)] == [IGNORED] * len(prompt)
        assert row.labels[len(prompt)] != IGNORED


def test_a_trimming_template_is_trained_as_it_renders() -> None:
    (row,) = rows_of(tokenizer("byte-level", TRIMS), CHAT)
    assert trained_parts(tokenizer("byte-level", TRIMS), row)[1] == "Bye<|im_end|>"


def test_a_template_that_rewrites_history_gives_a_row_for_each_answer() -> None:
    made = tokenizer("byte-level", REWRITES_HISTORY)
    rows = rows_of(made, CHAT)
    assert [trained_parts(made, row) for row in rows] == [
        ["  Bye\n\n<|endoftext|>"],
        ["Hello 👨‍👩‍👧 é ﷽!<|endoftext|>"],
    ]
    assert decode(made, rows[1].input_ids) == render(made, CHAT[:3])
    assert tokenize_conversation(made, CHAT) == rows[0]


def test_an_empty_thinking_block_of_the_prompt_is_part_of_the_training_text() -> None:
    made = tokenizer("byte-level", EMPTY_THOUGHT)
    (row,) = rows_of(made, CHAT[:3])
    prompt = render(made, CHAT[:2], add_generation_prompt=True)
    assert decode(made, row.input_ids).startswith(prompt)
    assert trained_parts(made, row) == ["Hello 👨‍👩‍👧 é ﷽!<|im_end|>"]


def test_a_prompt_that_opens_a_thinking_block_is_refused() -> None:
    with pytest.raises(UserError, match=r"does not train what it serves.*<think>.*reasoning_content"):
        training_texts(tokenizer("byte-level", OPEN_THOUGHT), CHAT)


def test_a_template_without_end_of_turn_token_is_refused() -> None:
    with pytest.raises(UserError, match="never learn to stop"):
        training_texts(tokenizer("byte-level", NO_END_OF_TURN), CHAT)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, WRITES_BOS])
def test_there_is_one_bos_where_the_tokenizer_or_the_template_has_one(template: str, adds_bos: bool) -> None:
    made = tokenizer("byte-level", template, adds_bos)
    (row,) = rows_of(made, CHAT[:3])
    assert leading_bos(made, row.input_ids) == int(adds_bos or template == WRITES_BOS)
    assert row.input_ids.count(made.bos_token_id) == leading_bos(made, row.input_ids)
    assert row.labels[0] == IGNORED
    prompt = tokenize_prompt(made, CHAT[:2])
    assert row.input_ids[: len(prompt)] == prompt


def test_two_bos_are_seen() -> None:
    made = tokenizer("byte-level", "{{ bos_token }}" + WRITES_BOS)
    assert leading_bos(made, rows_of(made, CHAT[:3])[0].input_ids) == 2


def test_a_token_joined_of_prompt_and_answer_is_counted_and_not_trained() -> None:
    made = tokenizer("byte-level")
    assert made.tokenize("\n\n") == ["ĊĊ"]
    (row,) = rows_of(made, [*CHAT[:2], {"role": "assistant", "content": "\n\nHello"}])
    assert row.merged == 1
    assert trained_parts(made, row) == ["\nHello<|im_end|>"]


def test_an_answer_that_nobody_asked_for_is_not_trained() -> None:
    (row,) = rows_of(tokenizer("byte-level"), CHAT[2:])
    assert trained_parts(tokenizer("byte-level"), row) == ["  Bye\n\n<|im_end|>"]


def test_special_tokens_spelled_in_an_answer_do_not_end_it() -> None:
    made = tokenizer("byte-level")
    (row,) = rows_of(made, [CHAT[1], {"role": "assistant", "content": "use <|im_end|> or <s>\n"}])
    assert trained_parts(made, row) == ["use <|im_end|> or <s>\n<|im_end|>"]


def test_a_template_that_refuses_is_a_users_error() -> None:
    made = tokenizer("byte-level", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(UserError, match=r"refuses a conversation of \(system, user\): System role not supported"):
        training_texts(made, CHAT[:3])


def test_no_template_is_a_users_error() -> None:
    with pytest.raises(UserError, match="has no chat template"):
        training_texts(tokenizer("byte-level", ""), CHAT)


def test_a_tokenizer_that_knows_no_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenize_texts(Slow(), [])


def test_tools_and_their_calls_are_rendered() -> None:
    template = "{{ tools | tojson if tools else '' }}" + CHATML
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    row = tokenize_conversation(tokenizer("byte-level", template), CHAT[:3], [tool])
    assert json.dumps(tool) in decode(tokenizer("byte-level", template), row.input_ids)


def test_labels_are_the_same_where_added_tokens_are_not_found_in_the_text_as_it_is() -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    made = tokenizer("byte-level")
    whole = json.loads(made.backend_tokenizer.to_str())
    for token in whole["added_tokens"]:
        token["normalized"] = True
    backend = tokenizers.Tokenizer.from_str(json.dumps(whole))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    other.chat_template = CHATML
    answers = [*CHAT, {"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "\n\n<|im_start|>"}]
    assert rows_of(other, answers) == rows_of(made, answers)


TEXTS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\n  <|>é👨‍👩‍👧你\u0301\u3000"), max_size=30
)


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(["byte-level", "byte-fallback"]),
    template=st.sampled_from([CHATML, TRIMS, REWRITES_HISTORY, EMPTY_THOUGHT, WRITES_BOS]),
    adds_bos=st.booleans(),
    turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
)
def test_any_text_is_labelled_to_the_character(
    kind: str, template: str, adds_bos: bool, turns: list[tuple[str, str]]
) -> None:
    made = tokenizer(kind, template, adds_bos)
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    texts = training_texts(made, messages)
    assert sum(len(text.spans) for text in texts) == len(turns)
    for text, row in zip(texts, tokenize_texts(made, texts), strict=True):
        check_row(made, row)
        first = text.text[: text.spans[0][0]]
        served = made(first, add_special_tokens=False)["input_ids"]
        start = next(at for at, label in enumerate(row.labels) if label != IGNORED)
        if not row.merged:
            assert "".join(trained_parts(made, row)) == "".join(text.text[a:b] for a, b in text.spans)
            assert row.input_ids[:start][-len(served) :] == served


def test_real_families(real: Any) -> None:
    rows = rows_of(real, CHAT)
    for row in rows:
        check_row(real, row)
        assert row.merged == 0 or "<|im_end|>" in real.get_vocab()  # SmolLM2 and Qwen do not trim "  Bye"
    trained = [part for row in rows for part in trained_parts(real, row)]
    assert len(trained) == 2
    for part, answer in zip(sorted(trained, key=lambda part: "Bye" in part), ("Hello 👨‍👩‍👧 é ﷽!", "Bye"), strict=True):
        assert answer in part
        assert part.endswith(("<|im_end|>", "<|eot_id|>", "<end_of_turn>"))
    prompt = tokenize_prompt(real, CHAT[:2])
    first = rows_of(real, CHAT[:3])[0]
    assert first.input_ids[: len(prompt)] == prompt
    whole = real.apply_chat_template(CHAT[:3], return_dict=False)
    assert first.input_ids == whole


def test_what_stands_before_an_answer_is_the_prompt_as_a_server_reads_it(real: Any) -> None:
    """A prompt's tokens are taken from the whole text up to its last added token: whatever the texts hold."""
    chance = random.Random(0)
    pieces = ["a", "b ", " ", "\n", "\t", "'s", "1", "é", "你", ".", "▁", "<", "|", ">", "</s>"]
    for _ in range(60):
        question, answer = ("".join(chance.choices(pieces, k=8)) for _ in range(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"x{answer}x"}]
        (row,) = rows_of(real, messages)
        served = tokenize_prompt(real, messages[:1])
        first = next(at for at, label in enumerate(row.labels) if label != IGNORED)
        assert row.input_ids[:first] == served
        assert row.merged == 0

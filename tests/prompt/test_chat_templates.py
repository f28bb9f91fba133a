"""The well-known chat templates on real tokenizers: what they train, what they need, and that it can be served."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import bases, servers, small_models
from transformers import AutoTokenizer

from pipeline.errors import UserError
from pipeline.ollama.rendering import choose
from pipeline.prompt.cases import conversations
from pipeline.prompt.chat_templates import DEFAULT
from pipeline.prompt.conformance import COMPARED, HARMLESS
from pipeline.prompt.labels import decode, leading_bos, tokenize_prompt, tokenize_texts, trained_parts, training_texts
from pipeline.prompt.template import ChatTemplate
from pipeline.prompt.tokenizer import load_tokenizer
from pipeline.resources import chat_templates
from pipeline.stages import data

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye"},
]
# On which tokenizer each is tried: one that has its tokens.
TOKENIZERS = {
    "alpaca": "llama2", "chatml": "qwen3", "completion": "llama2", "gemma": "gemma3", "llama-3": "llama3_1",
    "mistral": "mistral_nemo", "phi-3": "phi-3", "vicuna": "llama2", "zephyr": "llama3_1",
}  # fmt: skip
WRITTEN = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello thereEOS\n\n### Instruction:\nAnd?\n\n"
    "### Response:\nByeEOS\n\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Hello there<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nBye<|im_end|>\n",
    "completion": "Be brief.HiHello thereEOSAnd?ByeEOS",
    "gemma": "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello there<end_of_turn>\n"
    "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\nBye<end_of_turn>\n",
    "llama-3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello there<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nBye<|eot_id|>",
    "mistral": "[INST] Be brief.\n\nHi [/INST] Hello thereEOS[INST] And? [/INST] ByeEOS",
    "phi-3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello there<|end|>\n<|user|>\n"
    "And?<|end|>\n<|assistant|>\nBye<|end|>\n",
    "vicuna": "Be brief. USER: Hi ASSISTANT: Hello thereEOSUSER: And? ASSISTANT: ByeEOS",
    "zephyr": "<|system|>\nBe brief.EOS\n<|user|>\nHiEOS\n<|assistant|>\nHello thereEOS\n<|user|>\nAnd?EOS\n"
    "<|assistant|>\nByeEOS\n",
}


@cache
def raw(name: str) -> Path:
    """A tokenizer without a chat template; Phi-3's is Llama 2's with a few tokens more."""
    folder = small_models.scratch() / f"raw-{name}"
    if name != "phi-3":
        return bases.tokenizer_files(bases.short(name), folder, chat_template=False)
    tokenizer = AutoTokenizer.from_pretrained(raw("llama2"))
    tokenizer.add_tokens(["<|assistant|>", "<|system|>", "<|user|>", "<|end|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def trained(template: str) -> Any:
    """The tokenizer that a chat template is tried on, with that: nobody changes it."""
    tokenizer, _ = load_tokenizer(raw(TOKENIZERS[template]), chat_template=template)
    return tokenizer


@cache
def untouched(name: str) -> Any:
    """The base's own: nobody changes it."""
    return AutoTokenizer.from_pretrained(raw(name))


def test_all_are_tried() -> None:
    assert set(TOKENIZERS) == set(WRITTEN) == set(chat_templates())
    assert DEFAULT in chat_templates()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_answers_and_their_end_of_turn_are_trained(name: str) -> None:
    tokenizer = trained(name)
    (text,) = training_texts(tokenizer, CHAT)
    written = WRITTEN[name].replace("EOS", tokenizer.eos_token)
    own = untouched(TOKENIZERS[name])
    bos = own.bos_token if own("a").input_ids[:1] == [own.bos_token_id] and own.bos_token else ""
    assert text.text == bos + written
    (row,) = tokenize_texts(tokenizer, [text])
    assert leading_bos(tokenizer, row.input_ids) == bool(bos)
    assert [part.strip() for part in trained_parts(tokenizer, row)] == [
        f"Hello there{tokenizer.eos_token}",
        f"Bye{tokenizer.eos_token}",
    ]
    assert row.merged == 0
    prompt = tokenize_prompt(tokenizer, CHAT[:-1])
    assert row.input_ids[: len(prompt)] == prompt
    assert decode(tokenizer, row.input_ids[len(prompt) :]).strip().startswith("Bye")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_saved_is_what_is_trained(name: str, tmp_path: Path) -> None:
    tokenizer = trained(name)
    tokenizer.save_pretrained(tmp_path)
    saved, own = AutoTokenizer.from_pretrained(tmp_path), untouched(TOKENIZERS[name])
    assert saved.chat_template == tokenizer.chat_template
    assert saved.eos_token == tokenizer.eos_token
    assert saved.get_vocab() == own.get_vocab()
    assert (
        saved.apply_chat_template(CHAT, return_dict=False)
        == tokenize_texts(tokenizer, training_texts(tokenizer, CHAT))[0].input_ids
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_is_served_exactly(name: str) -> None:
    tokenizer = trained(name)
    template = ChatTemplate.from_tokenizer(tokenizer)
    for way in ("go", "native"):
        choice = choose(template, way, servers.engine())
        assert choice.way == way, choice.reason
        report = choice.reports[way]
        assert {outcome.status for outcome in report.outcomes} <= set(HARMLESS)
        assert sum(report.counts[status] for status in COMPARED) >= 40, report.summary
        assert len(report.outcomes) == len(conversations(template.special_tokens))


def test_a_raw_base_gets_the_default_and_is_told() -> None:
    tokenizer, said = load_tokenizer(raw("llama2"))
    assert tokenizer.eos_token == "</s>"
    (words,) = said
    assert f"no chat template and is trained with {DEFAULT}" in words
    assert "a turn ends with EOS, </s>" in words
    assert "model.chat_template: alpaca, chatml" in words


def test_the_key_replaces_an_instruct_models_own(tmp_path: Path) -> None:
    folder = bases.tokenizer_files(bases.short("llama3_1"), tmp_path / "instruct")
    tokenizer, said = load_tokenizer(folder, chat_template="alpaca")
    assert "### Instruction" in tokenizer.chat_template
    assert said == ["model.chat_template = alpaca: a turn ends with EOS, <|eot_id|>"]


def test_the_end_of_a_turn_becomes_eos(tmp_path: Path) -> None:
    """As a raw Qwen's, EOS is <|endoftext|>."""
    tokenizer = AutoTokenizer.from_pretrained(raw(small_models.BASE))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "raw")
    changed, said = load_tokenizer(tmp_path / "raw", chat_template="chatml")
    assert any("EOS is <|im_end|> instead of <|endoftext|>" in words for words in said)
    changed.save_pretrained(tmp_path / "trained")
    assert AutoTokenizer.from_pretrained(tmp_path / "trained").eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "tokenizer", "words"),
    [
        ("chatml", "llama3_1", "tokens that the base does not have: <|im_start|>, <|im_end|>"),
        ("gemma", "llama2", "tokens that the base does not have: <start_of_turn>, <end_of_turn>"),
        ("llama-3", small_models.BASE, "<|start_header_id|>, <|end_header_id|>, <|eot_id|>"),
        ("phi-3", "mistral_nemo", "<|user|>, <|end|>, <|assistant|>"),
    ],
)
def test_what_needs_new_tokens_is_refused(name: str, tokenizer: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_tokenizer(raw(tokenizer), chat_template=name)
    assert words in str(error.value)
    assert "need no other: alpaca, completion, mistral, vicuna, zephyr" in str(error.value)


def test_a_base_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(raw(small_models.BASE))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="the base's tokenizer names none .eos_token."):
        load_tokenizer(tmp_path / "base")


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}assistant>")
    with pytest.raises(UserError, match=r"ends an answer with '</s>assistant>', which is no token"):
        load_tokenizer(raw("llama2"), chat_template=str(file))
    file.write_text(file.read_text().replace("assistant>", "{% if add_generation_prompt %}assistant>{% endif %}"))
    tokenizer, _ = load_tokenizer(raw("llama2"), chat_template=str(file))
    assert tokenizer.chat_template == file.read_text()
    file.write_text("{{ raise_exception('never') }}")
    with pytest.raises(UserError, match="it refuses a conversation of .user, assistant.: never"):
        load_tokenizer(raw("llama2"), chat_template=str(file))


def test_the_data_stage_says_it_and_trains_it(tmp_path: Path) -> None:
    base = bases.base("raw-llama2-short", bases.short("llama2"), chat_template=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": CHAT}) + "\n", encoding="utf-8")
    sections: dict[str, Any] = {"data": {"train": str(rows), "validation_fraction": 0.0}, "train": {"max_length": 256}}
    task = small_models.make_task(tmp_path / "run", "data", model={"base": str(base)}, **sections)
    data.main(task)
    (warning,) = task.warnings
    assert f"trained with {DEFAULT}" in warning
    summary = json.loads((task.output / "data.json").read_text(encoding="utf-8"))
    assert summary["train_end_of_turn"] == ["</s>"]
    assert summary["train_leading_bos"] == [1]
    assert "<|assistant|>" in summary["train_examples"][0]["text"]

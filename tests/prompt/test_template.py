"""The trained template: one rendering, which is transformers' own; one BOS; the token that ends a turn."""

from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.prompt.template import (
    ChatTemplate,
    TemplateRefused,
    adds_bos,
    end_of_turn,
    render,
    token_ids,
    with_bos,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello."}]
TOOL = {"type": "function", "function": {"name": "lamp", "parameters": {}}}


def tokenizer(template: Any = CHATML, *, post: bool = False, **special: str) -> Any:
    """One of bytes; with `post` it puts <s> in front of every text."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    if post:
        number = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **(special or {"bos_token": "<s>", "eos_token": "</s>"}))
    made.chat_template = template
    return made


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{{ bos_token }}" + CHATML,
        "{{ pad_token is defined }}{{ bos_token is defined }}{{ eos_token }}",
        "{{ tools | tojson if tools else 'none' }}" + CHATML,
        {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML},
    ],
    ids=["plain", "BOS", "defined", "tools", "two templates"],
)
def test_a_conversation_is_rendered_as_transformers_does(template: Any, prompt: bool) -> None:
    for made in (tokenizer(template), tokenizer(template, eos_token="<|im_end|>")):
        for tools in (None, [TOOL]):
            theirs = made.apply_chat_template(CHAT, tools=tools, add_generation_prompt=prompt, tokenize=False)
            assert render(made, CHAT, tools=tools, add_generation_prompt=prompt) == theirs
            if isinstance(template, str):
                assert ChatTemplate.from_tokenizer(made).render(CHAT, tools, prompt=prompt) == theirs


def test_another_template_of_the_same_tokenizer_is_taken() -> None:
    made = tokenizer()
    before = render(made, CHAT)
    made.chat_template = "!" + CHATML
    assert render(made, CHAT) == f"!{before}"


def test_a_refusal_is_a_users_error_with_the_roles_and_the_templates_words() -> None:
    with pytest.raises(UserError, match=r"refuses a conversation of \(user, assistant\): never") as error:
        render(tokenizer("{{ raise_exception('never') }}"), CHAT)
    assert isinstance(error.value, TemplateRefused)
    assert error.value.words == "never"


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
def test_there_is_one_bos_whoever_writes_it(post: bool, template: str) -> None:
    made = tokenizer(template, post=post)
    assert adds_bos(made) == ChatTemplate.from_tokenizer(made).adds_bos == post
    text = render(made, CHAT)
    ids = token_ids(made, text)
    assert ids.count(made.bos_token_id) == int(post or template != CHATML)
    assert with_bos(made, ids) == ids
    served = ChatTemplate.from_tokenizer(made).served(text)  # to which the server adds its own
    assert made(served)["input_ids"] == ids


def test_a_tokenizer_without_bos_adds_none() -> None:
    assert not adds_bos(tokenizer(eos_token="<|im_end|>"))


@pytest.mark.parametrize(
    ("source", "unasked"),
    [
        (CHATML, ""),
        (CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"), "\n<|im_start|>assistant\n"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>\n{% endfor %}", ""),  # it writes none
        ("{% for m in messages %}{{ m.content }}<|im_end|><s>{% endfor %}", ""),
    ],
    ids=["asked", "always", "never", "two tokens"],
)
def test_an_answer_ends_where_a_template_goes_on_with_the_next_one(source: str, unasked: str) -> None:
    made = tokenizer(source)
    template = ChatTemplate.from_tokenizer(made)
    assert template.unasked_prompt == unasked
    theirs = made.apply_chat_template(CHAT, tokenize=False)
    assert template.render(CHAT, prompt=False) + unasked == render(made, CHAT) + unasked == theirs
    assert render(made, CHAT[:1], add_generation_prompt=True).endswith(unasked)
    if unasked:
        assert end_of_turn(made, render(made, CHAT)) == "<|im_end|>"
        assert end_of_turn(made, theirs) is None


def test_what_ends_a_turn() -> None:
    made = tokenizer()
    assert end_of_turn(made, render(made, CHAT)) == "<|im_end|>"
    assert end_of_turn(made, "an answer\n") is None
    assert end_of_turn(made, "an answer <s> \n\n") == "<s>"
    assert ChatTemplate(CHATML).between_turns() == "<|im_end|>\n<|im_start|>user\n"
    assert ChatTemplate("{{ raise_exception('never') }}").between_turns() == ""

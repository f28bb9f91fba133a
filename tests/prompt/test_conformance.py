"""The suite itself: that it holds what it promises."""

import itertools
import unicodedata

from pipeline.prompt.cases import CONVERSATIONS, conversations

TEXTS = [str(message["content"]) for case in CONVERSATIONS for message in case.messages]


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    assert len(CONVERSATIONS) >= 40
    assert len({case.name for case in CONVERSATIONS}) == len(CONVERSATIONS)


def test_the_model_has_to_answer_each() -> None:
    assert {case.messages[-1]["role"] for case in CONVERSATIONS} == {"user", "tool"}


def test_turns_and_systems_are_covered() -> None:
    users = [sum(message["role"] == "user" for message in case.messages) for case in CONVERSATIONS]
    systems = [sum(message["role"] == "system" for message in case.messages) for case in CONVERSATIONS]
    assert {1, 2, 3, 4, 5} <= set(users)
    assert {0, 1, 2} <= set(systems)


def test_neighbours_of_one_role_are_covered() -> None:
    pairs = {(a["role"], b["role"]) for case in CONVERSATIONS for a, b in itertools.pairwise(case.messages)}
    assert {("user", "user"), ("system", "system"), ("assistant", "assistant")} <= pairs


def test_texts_of_every_kind_are_covered() -> None:
    whole = "".join(TEXTS)
    for needed in ("{{", "{%", '"""', "\\", "\u00a0", "\u3000", "\u200d", "<|im_end|>", "</s>", "\r\n", "\u202e"):
        assert needed in whole, needed
    assert {"Cc", "Cf", "Mn", "Lo", "So"} <= {unicodedata.category(character) for character in whole}
    assert "" in TEXTS
    assert any(text != text.strip() for text in TEXTS)
    assert max(map(len, TEXTS)) > 4000


def test_thinking_and_tools_are_covered() -> None:
    assert {case.think for case in CONVERSATIONS} == {None, True, False}
    assert {len(case.tools) for case in CONVERSATIONS} == {0, 1, 2}
    assert any("tool_calls" in message for case in CONVERSATIONS for message in case.messages)
    assert sum(case.uses_tools for case in CONVERSATIONS) >= 4


def test_a_models_own_special_tokens_are_added() -> None:
    more = conversations(["<|weird|>", "", "<|odd|>"])[len(CONVERSATIONS) :]
    assert more
    assert all(any("<|weird|><|odd|>" in m["content"] for m in case.messages) for case in more)
    assert conversations() == CONVERSATIONS

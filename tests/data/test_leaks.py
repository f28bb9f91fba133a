"""Held-out questions in the training data, against the plain definition of likeness."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.leaks import find_leaks

from pipeline.data.formats import Conversation
from pipeline.data.word_pairs import NEAR


def row(question: str, answer: str = "ok", place: str = "a.jsonl:1") -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], place)


def test_a_question_that_was_trained_is_a_leak_whatever_its_case_and_answer() -> None:
    (leak,) = find_leaks([row("Turn it on, please!", "yes", "train:1")], [row("turn it on please", "no", "test:1")])
    assert (leak.train, leak.held_out, leak.similarity, leak.same_answer) == ("train:1", "test:1", 1.0, False)
    (leak,) = find_leaks([row("turn it on", "no")], [row("turn it on", " no")])
    assert leak.same_answer


def test_a_long_text_with_one_word_changed_is_a_leak_and_a_short_one_is_not() -> None:
    words = [f"word{number}" for number in range(60)]
    changed = [*words[:30], "other", *words[31:]]
    (leak,) = find_leaks([row(" ".join(words))], [row(" ".join(changed))])
    assert leak.similarity == pytest.approx(58 / 62)
    assert not find_leaks([row("set the lamp to 40")], [row("set the lamp to 50")])


def plain_similarity(left: str, right: str) -> float:
    sets = []
    for text in (left, right):
        words = ["", *re.findall(r"\w+", text.casefold())]
        sets.append({f"{a} {b}" for a, b in itertools.pairwise(words)} or {text})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


SENTENCES = st.lists(st.sampled_from("abcd"), max_size=25).map(" ".join)


@settings(deadline=None, max_examples=300)
@given(train=st.lists(SENTENCES, max_size=8), test=st.lists(SENTENCES, max_size=8))
def test_the_filter_finds_what_comparing_all_pairs_finds(train: list[str], test: list[str]) -> None:
    found = find_leaks(
        [row(text, place=f"train:{at}") for at, text in enumerate(train)],
        [row(text, place=f"test:{at}") for at, text in enumerate(test)],
    )
    best = {
        f"test:{at}": max((plain_similarity(text, other) for other in train), default=0) for at, text in enumerate(test)
    }
    assert {leak.held_out: leak.similarity for leak in found} == {
        place: similarity for place, similarity in best.items() if similarity >= NEAR
    }

"""Rows that are nearly the same are found, whatever stands between them, and others are not."""

import random

from pipeline.data.formats import Conversation
from pipeline.data.near_duplicates import NearDuplicates

WORDS = [f"word{number}" for number in range(3000)]


def row(text: str, place: str) -> Conversation:
    return Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}], place)


def test_planted_near_duplicates_are_found_and_nothing_else() -> None:
    chance = random.Random(1)
    texts = [chance.choices(WORDS, k=100) for _ in range(300)]
    found = NearDuplicates()
    for number, words in enumerate(texts):
        found.add(row(" ".join(words), f"a:{number}"))
    for number in range(40):  # one word of a hundred is another: 98 of 104 pairs are the same
        changed = [*texts[number]]
        changed[50] = "other"
        found.add(row(" ".join(changed).upper() + "!", f"b:{number}"))
    pairs = {place: (other, similarity) for place, other, similarity, _ in found.found()}
    assert len(pairs) >= 36  # an estimate may miss some
    for place, (other, similarity) in pairs.items():
        assert place.replace("b", "a") == other
        assert 0.9 <= similarity <= 1


def test_the_same_words_are_the_same_whatever_the_punctuation_and_short_rows_are_not_near() -> None:
    found = NearDuplicates()
    for number, text in enumerate(["Set the lamp to 40", "set the lamp to 50", "SET the lamp, to 40!", "", "!?"]):
        found.add(row(text, str(number)))
    assert list(found.found())[:1] == [("2", "0", 1.0, False)]
    assert list(NearDuplicates().found()) == []

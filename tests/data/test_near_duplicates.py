"""Rows that are nearly the same are found, whatever stands between them, and others are not."""

import random

from pipeline.data.near_duplicates import NearDuplicates, signatures

WORDS = [f"word{number}" for number in range(3000)]


def take(found: NearDuplicates, rows: dict[str, str]) -> None:
    for place, signature in zip(rows, signatures(list(rows.values())), strict=True):
        found.add(place, signature)


def test_planted_near_duplicates_are_found_and_nothing_else() -> None:
    chance = random.Random(1)
    texts = [chance.choices(WORDS, k=100) for _ in range(300)]
    found = NearDuplicates()
    rows = {f"a:{number}": " ".join(words) for number, words in enumerate(texts)}
    for number in range(40):  # one word of a hundred is another: 98 of 102 pairs are the same
        changed = [*texts[number]]
        changed[50] = "other"
        rows[f"b:{number}"] = " ".join(changed).upper() + "!"
    take(found, rows)
    pairs = {place: (other, similarity) for place, other, similarity, _ in found.found()}
    assert len(pairs) >= 36  # an estimate may miss some
    for place, (other, similarity) in pairs.items():
        assert place.replace("b", "a") == other
        assert 0.9 <= similarity <= 1


def test_the_same_words_are_the_same_whatever_the_punctuation_and_short_rows_are_not_near() -> None:
    found = NearDuplicates()
    texts = ("Set the lamp to 40", "set the lamp to 50", "SET the lamp, to 40!", "", "!?")
    take(found, {str(number): text for number, text in enumerate(texts)})
    assert list(found.found())[:1] == [("2", "0", 1.0, False)]
    assert list(NearDuplicates().found()) == []

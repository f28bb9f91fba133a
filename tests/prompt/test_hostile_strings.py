"""The hostile strings: enough of them, different, repeatable, and of the kinds that they promise."""

import unicodedata

import pytest

from pipeline.prompt.hostile_strings import hostile_strings


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return hostile_strings(5000, special_tokens=["<|my_token|>"])


def test_every_text_is_different_not_empty_and_encodable(texts: list[str]) -> None:
    assert len(texts) == len(set(texts)) == 5000
    assert all(text.encode("utf-8") for text in texts)


def test_the_seed_decides(texts: list[str]) -> None:
    assert hostile_strings(5000, special_tokens=["<|my_token|>"]) == texts
    assert hostile_strings(5000, seed=1) != texts


@pytest.mark.parametrize("count", [1, 10, 100])
def test_a_small_count(count: int) -> None:
    assert len(hostile_strings(count)) == count


def test_all_kinds_are_there(texts: list[str]) -> None:
    everything = "".join(texts)
    scripts = {unicodedata.name(character, "").split(" ")[0] for character in set(everything)}
    assert scripts >= {
        "LATIN",
        "CJK",
        "HIRAGANA",
        "HANGUL",
        "CYRILLIC",
        "ARABIC",
        "HEBREW",
        "DEVANAGARI",
        "THAI",
    }
    categories = {unicodedata.category(character) for character in set(everything)}
    assert categories >= {"Nd", "Nl", "No", "Mn", "Me", "Cc", "Cf", "Co", "Cn", "Zs", "Zl", "Zp", "So", "Sm"}
    for sample in (
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "\x00",
        "\u202e",
        "\u3000",
        "\U0010ffff",
        "<|my_token|>",
        "<|im_end|>",
        "{{",
        '"""',
    ):
        assert sample in everything
    assert max(map(len, texts)) > 4000

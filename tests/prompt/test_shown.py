"""What `pipeline data --show` prints: all of the row, and what is trained in brackets."""

from array import array
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.data.token_file import TokenFile
from pipeline.prompt.labels import IGNORED
from pipeline.prompt.shown import CLOSE, OPEN, parts, show

WORDS = ["Hi", " there", "Hello", " you", "<end>"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<end>")
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_trained_tokens_are_in_brackets(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = [0, 1, 2, 3, 4, 0], [IGNORED, IGNORED, 2, 3, 4, IGNORED]
    shown = list(parts(tokenizer, ids, labels))
    assert shown == [("Hi there", False), (f"{OPEN}Hello you<end>{CLOSE}", True), ("Hi", False)]
    with_ids = list(parts(tokenizer, ids, labels, ids=True))
    assert with_ids[1] == (f"{OPEN}2:'Hello' 3:' you' 4:'<end>'{CLOSE}", True)
    assert list(parts(tokenizer, [2], [2])) == [(f"{OPEN}Hello{CLOSE}", True)]


def test_the_first_rows_are_printed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TokenFile(tmp_path / "a.arrow") as file:
        for last in (2, 3, 0):
            file.add(*(array("i", numbers).tobytes() for numbers in ([0, last, 4], [IGNORED, last, 4])))
    show(tokenizer, tmp_path / "a.arrow", 2)
    assert capsys.readouterr().out == "row 1: 3 tokens\nHi⟦Hello<end>⟧\nrow 2: 3 tokens\nHi⟦ you<end>⟧\n"

"""Rows as the model sees them, for `pipeline data --show`: the text of the tokens, the trained ones in brackets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.console import results
from pipeline.data.token_file import read_tokens
from pipeline.prompt.labels import IGNORED, decode

OPEN, CLOSE = "⟦", "⟧"


def parts(tokenizer: Any, input_ids: list[int], labels: list[int], *, ids: bool = False) -> Iterator[tuple[str, bool]]:
    """The row in runs of tokens that are trained, or are not.

    Args:
        tokenizer: the one that is trained with.
        input_ids: the row's tokens.
        labels: the same ids where the loss is taken, IGNORED elsewhere.
        ids: each token with its id, "42:' the'", instead of the text.

    Yields:
        The text of a run, in brackets where it is trained, and whether it is.
    """
    runs = itertools.groupby(zip(input_ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    for trained, pairs in runs:
        tokens = [token for token, _ in pairs]
        if ids:
            text = " ".join(f"{token}:{decode(tokenizer, [token])!r}" for token in tokens)
        else:
            text = decode(tokenizer, tokens)
        yield (f"{OPEN}{text}{CLOSE}" if trained else text), trained


def show(tokenizer: Any, path: Path, count: int, *, ids: bool = False) -> None:
    """Print the first sequences of a file of tokens."""
    from rich.text import Text

    for number, row in enumerate(itertools.islice(read_tokens(path), count), 1):
        text = Text(f"row {number}: {len(row['input_ids']):,} tokens\n", style="dim")
        for part, trained in parts(tokenizer, row["input_ids"], row["labels"], ids=ids):
            text.append(part, style="not dim green" if trained else "not dim")
        results().print(text, soft_wrap=True)

"""Logits of a transformers model over rows of token ids, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_TOGETHER = 1024  # tokens in a batch: enough for the matrix products, little memory for the logits


def predict(model: Any, rows: Sequence[Sequence[int]]) -> Iterator[list[Any]]:
    """Logits of rows, batch by batch in their order.

    Yields:
        For each row of a batch a float32 array [len(row), vocabulary]. A row is padded at its end, where a causal model
        does not look back from.
    """
    import torch

    at = 0
    while at < len(rows):
        end, width = at, 0
        while end < len(rows) and (end == at or max(width, len(rows[end])) * (end + 1 - at) <= _TOGETHER):
            width = max(width, len(rows[end]))
            end += 1
        padded = torch.zeros(end - at, width, dtype=torch.long)
        for place, row in enumerate(rows[at:end]):
            padded[place, : len(row)] = torch.tensor(row)
        with torch.inference_mode():
            logits = model(input_ids=padded.to(model.device)).logits.float().cpu().numpy()
        yield [logits[place, : len(row)] for place, row in enumerate(rows[at:end])]
        at = end

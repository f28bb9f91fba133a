"""Logits of a transformers model over rows of token ids, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

TOGETHER = 1024  # tokens in a batch: enough for the matrix products, little memory for the logits


def batches(rows: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Rows that are computed together, in their order."""
    at = 0
    while at < len(rows):
        end, width = at, 0
        while end < len(rows) and (end == at or max(width, len(rows[end])) * (end + 1 - at) <= TOGETHER):
            width = max(width, len(rows[end]))
            end += 1
        yield rows[at:end]
        at = end


def padded(batch: Sequence[Sequence[int]]) -> Any:
    """Rows as one tensor, padded at their ends, where a causal model does not look back from."""
    import torch

    ids = torch.zeros(len(batch), max(len(row) for row in batch), dtype=torch.long)
    for place, row in enumerate(batch):
        ids[place, : len(row)] = torch.tensor(row)
    return ids


def predict(model: Any, rows: Sequence[Sequence[int]]) -> Iterator[Any]:
    """Logits of rows, in their order: for each a float32 array [len(row), vocabulary]."""
    import torch

    for batch in batches(rows):
        with torch.inference_mode():
            logits = model(input_ids=padded(batch).to(model.device)).logits.float().cpu().numpy()
        for place, row in enumerate(batch):
            yield logits[place, : len(row)]

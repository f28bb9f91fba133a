"""Logits of a transformers model over rows of token ids, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.model.quiet import quiet_transformers

_TOGETHER = 1024  # tokens in a batch: enough for the matrix products, little memory for the logits


def fits_float32(folder: Path) -> bool:
    """Whether a model of 16-bit safetensors fits into the free memory in float32."""
    import psutil

    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return 2.2 * stored < psutil.virtual_memory().available


def load_float32(folder: Path) -> Any:
    """A model in float32, ready to be asked."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()


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

"""The held-out loss of a model: on answers that it was not trained on, in nats for each trained token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.sources import read_rows
from pipeline.model.predict import predict
from pipeline.prompt.labels import IGNORED

Rows = Sequence[tuple[list[int], list[int]]]  # token ids and labels


def read_held_out(data: Path, limit: int | None) -> tuple[str, list[tuple[list[int], list[int]]]]:
    """The rows of a run that were held out, cut to a number of tokens; the training rows where there are none.

    Args:
        data: what the data stage left.
        limit: longest row.

    Returns:
        Where the rows are from, "" if there are none, and the rows.
    """
    for name in ("validation", "train"):
        path = data / f"{name}.tokens.jsonl"
        if path.is_file() and (rows := list(read_rows(path))):
            return f"{name} rows", [(row["input_ids"][:limit], row["labels"][:limit]) for row in rows]
    return "", []


def first_tokens(rows: Rows, tokens: int) -> list[tuple[list[int], list[int]]]:
    """As many of the first rows as have this number of tokens together."""
    chosen, count = [], 0
    for ids, labels in rows:
        if count >= tokens:
            break
        chosen.append((ids, labels))
        count += len(ids)
    return chosen


def trained_places(labels: Sequence[int]) -> list[int]:
    """Positions that predict a trained token."""
    return [place for place in range(len(labels) - 1) if labels[place + 1] != IGNORED]


def loss_of(logits: Any, ids: Sequence[int], places: Sequence[int]) -> float:
    """The summed negative log likelihood of the tokens after these places.

    Args:
        logits: [len(ids), vocabulary].
        ids: the row.
        places: positions in it.
    """
    import numpy as np
    from scipy.special import log_softmax

    if not places:
        return 0.0
    likelihoods = log_softmax(logits[places].astype(np.float64), axis=-1)
    return float(-likelihoods[np.arange(len(places)), [ids[place + 1] for place in places]].sum())


def held_out_loss(model: Any, rows: Rows, update: Callable[[float], None]) -> float:
    """A model's mean loss over the trained tokens of rows; NaN if they have none.

    Args:
        model: a transformers causal language model.
        rows: token ids and labels.
        update: called with the number of rows that are done.
    """
    total, trained = 0.0, 0
    left = iter(rows)
    batches = predict(model, [ids for ids, _ in rows])
    for number, logits in enumerate(itertools.chain.from_iterable(batches), 1):
        ids, labels = next(left)
        places = trained_places(labels)
        total += loss_of(logits, ids, places)
        trained += len(places)
        update(number)
    return total / trained if trained else float("nan")

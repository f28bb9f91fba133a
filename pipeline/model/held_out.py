"""The held-out loss of a model: on answers that it was not trained on, in nats for each trained token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pipeline.data.token_file import read_tokens
from pipeline.model.predict import predict
from pipeline.prompt.labels import IGNORED
from pipeline.run.layout import Layout

Rows = Sequence[tuple[list[int], list[int]]]  # token ids and labels
MOST_COMPARED, LEAST_COMPARED = 5000, 500  # tokens
RowLoss = tuple[float, int]  # summed over the trained tokens of a row, in nats, and how many these are


def read_held_out(layout: Layout, limit: int | None = None) -> tuple[str, Iterator[tuple[list[int], list[int]]]]:
    """The rows on which losses are measured: those that were held out, or the training rows where there are none.

    Args:
        layout: the run.
        limit: where a row is cut, in tokens; None for nowhere.

    Returns:
        Where the rows are from, "" if there are none, and the rows, which are read as they are taken.
    """
    for name in ("validation", "train"):
        path = layout.tokens(name)
        if path.is_file() and next(read_tokens(path), None) is not None:
            return f"{name} rows", ((row["input_ids"][:limit], row["labels"][:limit]) for row in read_tokens(path))
    return "", iter(())


def compared_tokens(parameters: int | None) -> int:
    """How many held-out tokens a model is compared on, where nothing says so.

    The larger a model, the longer a token takes: from a billion parameters on they take as long together.
    """
    by_size = round(MOST_COMPARED * 1e9 / parameters) if parameters else MOST_COMPARED
    return max(LEAST_COMPARED, min(MOST_COMPARED, by_size))


def first_tokens(rows: Iterable[tuple[list[int], list[int]]], tokens: int) -> list[tuple[list[int], list[int]]]:
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


def row_loss(logits: Any, ids: Sequence[int], labels: Sequence[int]) -> RowLoss:
    """The loss on one row, of its logits [len(ids), vocabulary]."""
    import numpy as np
    from scipy.special import log_softmax

    places = trained_places(labels)
    if not places:
        return 0.0, 0
    likelihoods = log_softmax(logits[places].astype(np.float64), axis=-1)
    return float(-likelihoods[np.arange(len(places)), [ids[place + 1] for place in places]].sum()), len(places)


def held_out_losses(model: Any, rows: Rows, update: Callable[[float], None]) -> list[RowLoss]:
    """A model's loss on each row.

    Args:
        model: a transformers causal language model.
        rows: token ids and labels.
        update: called with the number of rows that are done.
    """
    losses = []
    for loss in row_losses(predict(model, [ids for ids, _ in rows]), rows):
        losses.append(loss)
        update(len(losses))
    return losses


def row_losses(predicted: Iterable[Any], rows: Rows) -> Iterator[RowLoss]:
    """The loss on each row, of its logits [len(ids), vocabulary]."""
    for logits, (ids, labels) in zip(predicted, rows, strict=True):
        yield row_loss(logits, ids, labels)


def mean_loss(losses: Iterable[RowLoss]) -> float:
    """The mean over the trained tokens of rows, in nats; NaN if they have none."""
    total, trained = 0.0, 0
    for loss, places in losses:
        total += loss
        trained += places
    return total / trained if trained else float("nan")

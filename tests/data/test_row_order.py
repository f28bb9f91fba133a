"""The order of rows: every row once, little padding, another order each epoch, the same for the same seed."""

import numpy as np
import pytest

from pipeline.data.row_order import RowOrder

LENGTHS = np.random.default_rng(0).geometric(1 / 200, 5003)


def padded(lengths: np.ndarray, order: list[int], batch: int) -> int:
    """The places that batches of these rows have, padding included."""
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    return sum(int(lengths[rows].max()) * len(rows) for rows in batches)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 200, 5003])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("is_padded", [True, False])
def test_every_row_comes_once_and_the_largest_batch_first(rows: int, epoch: int, is_padded: bool) -> None:
    sampler = RowOrder(LENGTHS[:rows], 4, seed=1, padded=is_padded)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(sampler) == rows
    assert sorted(order) == list(range(rows))
    whole = np.array(order[: rows // 4 * 4]).reshape(-1, 4)
    if len(whole):
        size = np.max if is_padded else np.sum
        assert size(LENGTHS[whole[0]]) == size(LENGTHS[whole], axis=1).max()


def test_an_order_is_that_of_its_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = RowOrder(LENGTHS, 8, seed, padded=True)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_batches_have_little_padding_and_lengths_in_random_order() -> None:
    order = list(RowOrder(LENGTHS, 8, seed=1, padded=True))
    random = np.random.default_rng(1).permutation(len(LENGTHS)).tolist()
    tokens = int(LENGTHS.sum())
    assert padded(LENGTHS, order, 8) - tokens < 0.1 * (padded(LENGTHS, random, 8) - tokens)
    means = LENGTHS[np.array(order[8:5000]).reshape(-1, 8)].mean(axis=1)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.15


def test_rows_that_are_laid_end_to_end_are_not_sorted() -> None:
    """Batches of like lengths would be as large as the largest rows together, and save nothing."""
    sampler = RowOrder(LENGTHS, 8, seed=1, padded=False)
    order = np.array(list(sampler)[8:5000]).reshape(-1, 8)
    assert LENGTHS[order].std(axis=1).mean() > 0.7 * LENGTHS.std()

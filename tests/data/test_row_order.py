"""The order of padded rows: every row once, little padding, another order each epoch, the same for the same seed."""

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
def test_every_row_comes_once_and_the_longest_batch_first(rows: int, epoch: int) -> None:
    sampler = RowOrder(LENGTHS[:rows], 4, seed=1)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(sampler) == rows
    assert sorted(order) == list(range(rows))
    whole = np.array(order[: rows // 4 * 4]).reshape(-1, 4)
    if len(whole):
        assert sampler.lengths[whole[0]].max() == sampler.lengths[whole].max()


def test_an_order_is_that_of_its_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = RowOrder(LENGTHS, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_batches_have_little_padding_and_lengths_in_random_order() -> None:
    order = list(RowOrder(LENGTHS, 8, seed=1))
    random = np.random.default_rng(1).permutation(len(LENGTHS)).tolist()
    tokens = int(LENGTHS.sum())
    assert padded(LENGTHS, order, 8) - tokens < 0.1 * (padded(LENGTHS, random, 8) - tokens)
    means = LENGTHS[np.array(order[8:5000]).reshape(-1, 8)].mean(axis=1)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.15

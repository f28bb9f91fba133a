"""The order in which rows are trained: at random, and where they are padded, rows of like lengths in one batch.

A padded batch is as long as its longest row. Of rows with 20, 900, 30 and 1000 tokens, batches of two have 1850 places
of padding as [20, 900] and [30, 1000], and 110 as [20, 30] and [900, 1000]. The largest batch comes first: what does
not fit into the memory fails at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WINDOW = 50  # batches whose rows are sorted together: fewer leave padding, more put the same rows together every time


class RowOrder:
    """A sampler of torch's kind: the indices of all rows, each once an epoch; the same for the same seed and epoch.

    Args:
        lengths: of every row, in tokens.
        batch: rows in a batch.
        seed: of the order.
        padded: whether the rows of a batch are padded to one length, or laid end to end.
    """

    def __init__(self, lengths: NDArray[np.integer], batch: int, seed: int, *, padded: bool) -> None:
        self.lengths, self.batch, self.seed, self.padded = lengths, batch, seed, padded
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own; the trainer says which one begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        import numpy as np

        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        if self.padded:
            window = _WINDOW * self.batch
            for start in range(0, len(order), window):
                part = order[start : start + window]
                order[start : start + window] = part[np.argsort(-self.lengths[part], kind="stable")]
        whole = len(order) // self.batch * self.batch  # a smaller batch stays the last one
        batches = order[:whole].reshape(-1, self.batch)
        generator.shuffle(batches)
        if len(batches):
            lengths = self.lengths[batches]
            sizes = lengths.max(axis=1) if self.padded else lengths.sum(axis=1)
            largest = int(sizes.argmax())
            batches[[0, largest]] = batches[[largest, 0]]
        yield from batches.ravel().tolist()
        yield from order[whole:].tolist()

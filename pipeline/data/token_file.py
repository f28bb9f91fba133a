"""Token ids and labels as the data stage leaves them: an Arrow file that is mapped into memory, so that neither
training nor a check is sized by the rows.
"""

from __future__ import annotations

import itertools
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_BATCH = 1000  # sequences in a record batch


def as_bytes(numbers: Sequence[int]) -> bytes:
    """Ids or labels as a file has them: 4 bytes each."""
    return struct.pack(f"{len(numbers)}i", *numbers)  # twice as quick as an array


def of_bytes(stored: bytes) -> list[int]:
    """The numbers that `as_bytes` was given."""
    return array("i", stored).tolist()


class TokenFile:
    """Writes sequences to an Arrow file, a stream of record batches as the datasets library maps them.

    Args:
        path: the file; it is there, with no sequences, from the start.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        ids = pyarrow.list_(pyarrow.int32())
        self._schema = pyarrow.schema([("input_ids", ids), ("labels", ids)])
        self._writer = pyarrow.ipc.new_stream(str(path), self._schema)
        self._begin()

    def _begin(self) -> None:
        self._ends, self._ids, self._labels = array("i", [0]), array("i"), array("i")

    def add(self, input_ids: bytes, labels: bytes) -> None:
        """Append a sequence, which `as_bytes` made bytes of."""
        self._ids.frombytes(input_ids)
        self._labels.frombytes(labels)
        self._ends.append(len(self._ids))
        if len(self._ends) > _BATCH:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        ends, *flat = (
            pyarrow.Array.from_buffers(pyarrow.int32(), len(values), [None, pyarrow.py_buffer(values)])
            for values in (self._ends, self._ids, self._labels)
        )
        columns = [pyarrow.ListArray.from_arrays(ends, values) for values in flat]
        self._writer.write_batch(pyarrow.record_batch(columns, schema=self._schema))
        self._begin()

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if len(self._ends) > 1 and error is None:
            self._flush()
        self._writer.close()


def read_tokens(path: Path) -> Iterator[dict[str, Any]]:
    """The sequences of a file as {"input_ids", "labels"}, lists of token ids, in their order."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
        for batch in batches:
            for start in range(batch.num_rows):
                yield batch.slice(start, 1).to_pylist()[0]


def put_in_order(path: Path, order: Iterable[int]) -> None:
    """Write a file anew.

    Args:
        path: the file.
        order: the sequences by their numbers, as they are to stand.
    """
    import pyarrow

    numbers, shuffled = iter(order), path.with_suffix(".shuffled")
    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        table = stream.read_all()  # mapped, not read
        with pyarrow.ipc.new_stream(str(shuffled), table.schema) as writer:
            while some := list(itertools.islice(numbers, _BATCH)):
                writer.write_table(table.take(some).combine_chunks())
    shuffled.replace(path)


def token_count(path: Path) -> int:
    """The tokens of all sequences of a file together."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
        return sum(len(batch.column("input_ids").flatten()) for batch in batches)

"""The file of sequences: written batch by batch, read one after the other, mapped by the datasets library."""

from array import array
from pathlib import Path

import pytest

from pipeline.data.token_file import TokenFile, read_tokens, token_count


@pytest.mark.parametrize("rows", [0, 1, 999, 1000, 2500])
def test_what_is_written_is_read_by_us_and_by_the_datasets_library(tmp_path: Path, rows: int) -> None:
    from datasets import Dataset

    path = tmp_path / "a.tokens.arrow"
    wanted = [{"input_ids": [1, 2, *range(row % 5)], "labels": [-100, 2, *range(row % 5)]} for row in range(rows)]
    with TokenFile(path) as file:
        for row in wanted:
            file.add(array("i", row["input_ids"]).tobytes(), array("i", row["labels"]).tobytes())
    assert list(read_tokens(path)) == wanted
    assert token_count(path) == sum(len(row["input_ids"]) for row in wanted)
    mapped = Dataset.from_file(str(path))
    assert mapped.to_list() == wanted
    assert bool(mapped) == bool(rows)

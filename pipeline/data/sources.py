"""Rows from files: JSON lines, a JSON list, CSV, Parquet. Each comes with its place, for every message about it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


def read_rows(path: Path) -> Iterator[Any]:
    """The values of a run's file of JSON lines.

    A text may hold what str.splitlines takes for a line's end (U+2028 and others): only a line feed ends a line.

    Raises:
        UserError: a line is not JSON.
    """
    return (row for _, row in _json_lines(path))


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Every row of a user's file with its place, e.g. ("train.jsonl:3", {...}).

    Raises:
        UserError: the file cannot be read, or what kind it is cannot be told.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_array,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    if (reader := readers.get(path.suffix.lower())) is None:
        raise UserError(f"{path}: cannot tell what kind of file this is; known are: {', '.join(readers)}")
    try:
        yield from reader(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            text = _decoded(line, place, first=number == 1)
            if text.strip():
                yield place, parse_json(text, place)


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    data = path.read_bytes()
    if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _json_lines(path)  # many a .json holds lines
        return
    for number, row in enumerate(parse_json(_decoded(data, str(path), first=True), str(path)), 1):
        yield f"{path}: row {number}", row


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    text = _decoded(path.read_bytes(), str(path), first=True)
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long document
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}:{reader.line_num}: has not as many fields as the first line has names")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {error}") from None


def _decoded(data: bytes, place: str, *, first: bool) -> str:
    """Text of UTF-8 bytes; a byte order mark at the start of a file is no part of the text."""
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: it is none; says where.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{place}:{error.lineno}" if error.lineno > 1 else place
        raise UserError(f"{where}: not valid JSON at column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{place}: not JSON that can be read: {error}") from None

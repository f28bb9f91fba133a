"""Rows from files: JSON lines, JSON, CSV, TSV, Parquet, Arrow, each plain or compressed, alone or many in a folder.

Each row comes with its place, for every message about it. Rows are a stream: no file is held in memory whole.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.config import is_on_hub, is_pattern
from pipeline.data.hub_files import HubData
from pipeline.data.json_stream import elements
from pipeline.errors import UserError

COMPRESSED = (".gz", ".zst")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # what such files begin with
# {"train": [{...}]} and not {"messages": [{"role": ...}]}, which is a row.
_WRAPPED = re.compile(rb'\{\s*"[^"\\]*"\s*:\s*\[\s*(\]|\{\s*"(?!(role|content|from|value)"))')
_NO_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json")  # what the datasets library writes beside rows
Rows = Iterator[tuple[str, Any]]
_BATCH = 1000  # rows that are taken out of Arrow at a time


def read_rows(path: Path) -> Iterator[Any]:
    """The values of a run's file of JSON lines.

    A text may hold what str.splitlines takes for a line's end (U+2028 and others): only a line feed ends a line.

    Raises:
        UserError: a line is not JSON.
    """
    return (row for _, row in placed_rows(path))


def placed_rows(path: Path) -> Rows:
    """The values of a run's file of JSON lines with their places.

    Raises:
        UserError: a line is not JSON.
    """
    with path.open("rb") as file:
        for place, line in _json_lines(file, path):
            yield place, _value_of(line, place)


def files_of(path: Path) -> list[Path]:
    """The files that a path of the configuration means: itself, those of a folder or of a hub's data set, or those that
    a pattern fits.

    Raises:
        UserError: there is none, or a folder has files of an unknown kind.
        PipelineError: the hub cannot be reached.
    """
    if is_on_hub(path):
        return HubData.of(path).files()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file, path))
        if other := [file for file in found if kind_of(file) is None and file.suffix.lower() not in (".md", ".txt")]:
            raise UserError(
                f"{other[0]}: cannot tell what kind of file this is; known are: {', '.join(_READERS)}, each also with "
                f"{' or '.join(COMPRESSED)}; move it out of {path}, or give a pattern such as {path / '*.jsonl'}"
            )
        found = [file for file in found if kind_of(file) is not None]
        if not found:
            raise UserError(f"{path}: the folder has no data files; known are: {', '.join(_READERS)}")
        return found
    if is_pattern(path):
        plain = next(number for number, part in enumerate(path.parts) if any(c in part for c in "*?["))
        root = Path(*path.parts[:plain])
        if found := sorted(file for file in root.glob(str(Path(*path.parts[plain:]))) if file.is_file()):
            return found
        raise UserError(f"{path}: no file fits this pattern")
    return [path]


def rows_of(path: Path) -> Rows:
    """Every row of a user's file with its place, e.g. ("train.jsonl:3", {...}).

    A line that cannot be read is a row too: its value is the UserError.

    Raises:
        UserError: the file as a whole cannot be read, or what kind it is cannot be told.
    """
    return ((place, parsed(row, place)) for place, row in unparsed_rows(path))


def unparsed_rows(path: Path) -> Rows:
    """The same, but a line of JSON is its bytes still: `parsed` makes a row of it, in whatever process."""
    for file in files_of(path):
        yield from _rows_of_file(file)


def parsed(row: Any, place: str) -> Any:
    """A row of `unparsed_rows` as `rows_of` gives it."""
    if not isinstance(row, bytes):
        return row
    try:
        return _value_of(row, place)
    except UserError as error:
        return error


def file_of(place: str) -> str:
    """The file of a row's place."""
    return place.rpartition(":")[0]


def kind_of(path: Path) -> str | None:
    """The kind of a data file by its name, e.g. ".jsonl"; None where it is no known one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def named_by_content(path: Path) -> str | None:
    """How the name of a data file has to end, e.g. ".jsonl.gz", by how its content begins; None for no known kind.

    Raises:
        UserError: it cannot be read.
    """
    with _legible(path):
        with path.open("rb") as plain:
            head = plain.read(len(_ZSTD))
        compression = ".gz" if head.startswith(_GZIP) else ".zst" if head == _ZSTD else ""
        with _opened(path, compression) as file:
            head = file.read(1 << 16)
    kind = _kind_of_head(head.removeprefix(codecs.BOM_UTF8).lstrip())
    return kind and kind + compression


def _kind_of_head(head: bytes) -> str | None:
    if head.startswith(b"{"):
        return ".json" if _WRAPPED.match(head) else ".jsonl"
    if head.startswith(b"["):
        return ".json"
    if head.startswith(b"PAR1"):
        return ".parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):  # with a footer, or as a stream
        return ".arrow"
    names, _, _ = head.partition(b"\n")
    return ".tsv" if b"\t" in names else ".csv" if b"," in names else None


def _hidden(file: Path, folder: Path) -> bool:
    """Whether a file is none of the user's: of git, of a download, of the datasets library."""
    return file.name in _NO_ROWS or any(part.startswith(".") for part in file.relative_to(folder).parts)


def _rows_of_file(path: Path) -> Rows:
    if (kind := kind_of(path)) is None:
        raise UserError(
            f"{path}: cannot tell what kind of file this is; known are: {', '.join(_READERS)}, each also with "
            f"{' or '.join(COMPRESSED)}"
        )
    with _legible(path), _opened(path, path.suffix.lower()) as file:
        yield from _READERS[kind](file, path)


@contextmanager
def _legible(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except EOFError:
        raise UserError(f"{path}: cannot be read: the compressed file is cut off") from None
    except (OSError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _opened(path: Path, suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(_Readable(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")))
    return path.open("rb")


class _Readable(io.RawIOBase):
    """A stream of pyarrow's as Python's own readers take one."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _json_lines(file: IO[bytes], path: Path) -> Rows:
    """The lines that are not blank, as bytes."""
    for number, line in enumerate(file, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.decode("utf-8", "replace").strip():
            yield f"{path}:{number}", line


def _json(file: IO[bytes], path: Path) -> Rows:
    """A list, an object whose one value is such a list, or lines: many a .json holds these."""
    assert isinstance(file, io.BufferedReader)
    head = file.peek().removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"[") and not _WRAPPED.match(head):
        yield from _json_lines(file, path)
        return
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        for number, row in enumerate(elements(text, str(path)), 1):
            yield f"{path}: row {number}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _csv(file: IO[bytes], path: Path, delimiter: str = ",") -> Rows:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long document
    reader = csv.DictReader(text, strict=True, delimiter=delimiter)
    try:
        if len(set(names := reader.fieldnames or ())) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise UserError(f'{path}:1: the column "{twice}" occurs twice; give each a name of its own')
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                yield place, UserError(f"{place}: has not as many fields as the first line has names")
            else:
                yield place, {key: value for key, value in row.items() if value != ""}
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 after line {reader.line_num} ({error.reason}); save the file as UTF-8"
        ) from None


def _tsv(file: IO[bytes], path: Path) -> Rows:
    return _csv(file, path, "\t")


def _parquet(file: IO[bytes], path: Path) -> Rows:
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        with _seekable(file) as whole, parquet.ParquetFile(whole) as reader:
            yield from reader.iter_batches(batch_size=_BATCH)

    return _arrow_rows(batches(), path, "Parquet")


def _arrow(file: IO[bytes], path: Path) -> Rows:
    """Arrow's two ways to lie in a file: with a footer, or as a stream, which the datasets library writes."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with _seekable(file) as whole:
            footed = whole.read(6) == b"ARROW1"
            whole.seek(0)
            if footed:
                reader = pyarrow.ipc.open_file(whole)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                yield from pyarrow.ipc.open_stream(whole)

    return _arrow_rows(batches(), path, "Arrow")


def _seekable(file: IO[bytes]) -> IO[bytes]:
    """The file itself, or what a compressed one holds: these formats are read from many places."""
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        return file
    import shutil
    import tempfile

    whole = tempfile.TemporaryFile()  # noqa: SIM115  (who reads from it closes it)
    shutil.copyfileobj(file, whole)
    whole.seek(0)
    return whole


def _arrow_rows(batches: Iterator[Any], path: Path, kind: str) -> Rows:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH):
                for row in batch.slice(start, _BATCH).to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield f"{path}: row {number}", without_padding(row)
    except (pyarrow.ArrowException, OSError) as error:
        words = str(error).splitlines()[0]
        raise UserError(f"{path}: not {kind} that can be read, after row {number:,}: {words}") from None


def without_padding(value: Any) -> Any:
    """A value of Arrow without the keys that are there only because all rows of a column share one struct."""
    if isinstance(value, dict):
        return {key: without_padding(item) for key, item in value.items() if item is not None}
    return [without_padding(item) for item in value] if isinstance(value, list) else value


def _value_of(line: bytes, place: str) -> Any:
    try:
        return parse_json(line.decode().rstrip(), place)
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


_READERS: dict[str, Callable[[IO[bytes], Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
KINDS = tuple(_READERS)

"""One reader per file format. Each yields `Row`s and knows nothing of configurations.

Text formats are decoded with undecodable bytes kept as surrogates, so that a line in another encoding spoils itself
and not the structure of the file around it.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sotto.errors import SottoError

NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
WRONG_COLUMNS = "wrong number of columns"
OPEN_QUOTE = "a quote that is never closed"
MAX_OPEN_QUOTES = 20


@dataclass(frozen=True)
class Row:
    """One record of a file, or its header, or a line that could not be read.

    Attributes:
      line: see `Table.lines`.
      values: column name -> value as the format gives it; None for a header or a bad line.
      problem: why the line could not be read.
      header: the names of the columns, where the format states them once.
    """

    line: int
    values: dict[str, Any] | None = None
    problem: str = ""
    header: list[str] | None = None


def as_text(value: Any) -> str | list[str] | None:
    """A value as text; a list as a list of texts; None for what is not text (objects, nested lists).

    Missing values become the empty string.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if value != value:  # NaN is how many tools write a missing value
            return ""
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    if isinstance(value, list):
        items = [None if isinstance(item, list) else as_text(item) for item in value]
        return None if any(item is None for item in items) else [str(item) for item in items]
    return None if isinstance(value, dict | tuple) else str(value)


def is_unicode(text: str) -> bool:
    """False if the text holds surrogates: bytes that were not UTF-8, or half a character written as a JSON escape."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_csv(path: Path) -> Iterator[Row]:
    return _delimited(path, ",", csv.QUOTE_MINIMAL)


def read_tsv(path: Path) -> Iterator[Row]:
    """Tab-separated, as GLUE writes it: a quotation mark is a character like any other."""
    return _delimited(path, "\t", csv.QUOTE_NONE)


def _delimited(path: Path, delimiter: str, quoting: int) -> Iterator[Row]:
    header: list[str] | None = None
    for line, record, problem in _records(path, delimiter, quoting):
        if header is None:
            header = [name.strip() for name in record]
            if problem or not all(is_unicode(name) for name in header):
                raise unreadable(path, f"the names of the columns: {problem or NOT_UTF8}", line=line)
            yield Row(line, header=header)
        elif problem:
            yield Row(line, problem=problem)
        elif len(record) != len(header):
            yield Row(line, problem=WRONG_COLUMNS)
        else:
            yield Row(line, dict(zip(header, record, strict=True)))


def _records(path: Path, delimiter: str, quoting: int) -> Iterator[tuple[int, list[str], str]]:
    """Yields (line where the record starts, fields, problem). Blank lines are passed over.

    A quote that is never closed would swallow the rest of the file as one field. That line is reported instead, and
    reading goes on at the next one. (A second stray quote closes the first: then the rows between the two are one
    record, which as a rule has the wrong number of columns.)
    """
    feed, read, open_quotes = _Feed(_lines(path)), 0, 0
    # Only csv.QUOTE_* constants come in; the stub wants their literal type.
    options: dict[str, Any] = {"delimiter": delimiter, "quoting": quoting}
    reader = csv.reader(feed, **options)
    while True:
        feed.taken.clear()
        try:
            with _large_fields():
                record, problem = next(reader, None), ""
        except csv.Error:
            record, problem = [], WRONG_COLUMNS
        if record is None:
            return
        line = read + 1
        if feed.exhausted and feed.taken:
            open_quotes += 1
            if open_quotes > MAX_OPEN_QUOTES:
                raise unreadable(path, f"{OPEN_QUOTE} (and {MAX_OPEN_QUOTES} more before)", line=line)
            record, problem = [], OPEN_QUOTE
            read += 1
            feed = _Feed(feed.taken[1:])
            reader = csv.reader(feed, **options)
        else:
            read += len(feed.taken)
        if record or problem:
            yield line, record, problem


class _Feed:
    """Lines for csv.reader that remembers which ones the current record took, and whether there was a next one."""

    def __init__(self, lines: Iterable[str]):
        self._lines = iter(lines)
        self.taken: list[str] = []
        self.exhausted = False

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            self.exhausted = True
            raise
        self.taken.append(line)
        return line


@contextmanager
def _large_fields() -> Iterator[None]:
    """The csv module's limit of 128 KiB per field is global to the process: lift it, and put it back."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from file
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from None


def read_json(path: Path) -> Iterator[Row]:
    """JSON lines, or one top-level array of objects. Blank lines are passed over."""
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
            file.seek(0)
            if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                yield from _json_array(path, file.read())
                return
            for number, raw in enumerate(file, start=1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if raw.strip():
                    yield _json_row(number, raw)
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from None


def _json_row(line: int, raw: bytes) -> Row:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_missing)
    except UnicodeDecodeError:
        return Row(line, problem=NOT_UTF8)
    except (ValueError, RecursionError):
        return Row(line, problem=NOT_JSON)
    return Row(line, value) if isinstance(value, dict) else Row(line, problem="not a JSON object")


def _missing(_constant: str) -> None:
    """NaN and Infinity are no JSON, and mean that there is no value."""


def _json_array(path: Path, raw: bytes) -> Iterator[Row]:
    """The elements of one array, each with the line where it starts."""
    text = raw.decode("utf-8-sig", errors="surrogateescape")
    decoder = json.JSONDecoder(parse_constant=_missing)
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = _skip_blank(text, position)
        if text[position : position + 1] == "]":
            if _skip_blank(text, position + 1) < len(text):
                raise unreadable(path, "something stands after the end of the JSON array")
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            raise unreadable(path, "the JSON array is broken here", line=line) from None
        yield Row(line, value) if isinstance(value, dict) else Row(line, problem="not a JSON object")
        position = _skip_blank(text, position)
        if text[position : position + 1] not in (",", "]"):
            raise unreadable(path, "the JSON array is broken here", line=line)
        position += text[position] == ","


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def read_parquet(path: Path, columns: list[str]) -> Iterator[Row]:
    """The named columns (those that exist). Not through `datasets`, which would copy the text into its cache."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            yield Row(0, header=names)
            number = 0
            for batch in file.iter_batches(columns=[name for name in names if name in columns]):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, values)
    except OSError as error:
        raise unreadable(path, error.strerror or "it is not a Parquet file") from None
    except UnicodeDecodeError:  # in a column's name or a value
        raise unreadable(path, "a text in it is not UTF-8") from None
    except pyarrow.ArrowException as error:
        raise unreadable(path, f"it is not a Parquet file that can be read ({type(error).__name__})") from None


def read_folder(files: list[Path]) -> Iterator[Row]:
    """One row per file: `text` and `file` (its name)."""
    yield Row(0, header=["text", "file"])
    for number, path in enumerate(files, start=1):
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            yield Row(number, problem=NOT_UTF8)
        except OSError as error:
            raise unreadable(path, error.strerror or str(error)) from None
        else:
            yield Row(number, {"text": text, "file": path.name})


def read_hub(name: str, subset: str | None, split: str, columns: list[str]) -> Iterator[Row]:
    """The named columns (those that exist) of a Hub dataset. Code from the Hub is never run."""
    import datasets

    try:
        loaded: Any = datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        # `datasets` raises many types here, some of its own and some of the network stack: all mean the same to a user.
        lines = str(error).splitlines() or [""]
        raise SottoError(
            "SOT205",
            what=f"the Hub dataset '{name}' cannot be loaded ({type(error).__name__}: {lines[0][:200]})",
            where=f"data: {name}, subset {subset or '(none)'}, split {split}",
            why="there is no file of that name here, so it was looked for on the Hub and in the local cache",
            fix="check the name, subset and split; without a network, give a local file or fill the cache beforehand",
        ) from None
    names = list(loaded.column_names)
    yield Row(0, header=names)
    # Columns that are not asked for are not decoded: they may be images.
    for number, values in enumerate(loaded.select_columns([name for name in names if name in columns]), start=1):
        yield Row(number, values)


def unreadable(path: Path, problem: str, line: int | None = None) -> SottoError:
    return SottoError(
        "SOT201",
        what=f"the data cannot be read: {problem}",
        where=f"{path}:{line}" if line else str(path),
        why="what cannot be read cannot be protected or learned",
        fix="check that the file is whole, that you may read it, and that its text is saved as UTF-8",
    )

"""Files to rows: a `Table` of text columns, with every row that could not be read named by its line.

One function, `read_table`. Which reader runs is decided by the suffix; the readers themselves are in `formats.py`.

What is covered: a bad line (wrong encoding, bad JSON, wrong number of columns, a quote that is never closed) costs that
line only. Nothing of the file is written anywhere: no cache, no temporary copy.
What is not covered: Hub datasets are downloaded by `datasets` into its usual cache, as every Hub dataset is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sotto.config import DataSection
from sotto.data import formats
from sotto.data.formats import Row
from sotto.errors import SottoError, did_you_mean

EMPTY = "empty text"
NO_LABEL = "missing label"
UNKNOWN_LABEL = "label not in data.labels"
NO_UNIT = "missing unit"
CUT = "longer than max_length: cut"
NO_TOKENS = "no tokens"
NOT_TOKENISED = "cannot be tokenised"

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
SHOWN_NAMES, SHOWN_CHARACTERS = 20, 40


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used (or, for `CUT`, not whole).

    Attributes:
      line: as in `Table.lines`.
      reason: one of a fixed set of public phrases. It never holds text of the row.
    """

    line: int
    reason: str


@dataclass
class Table:
    """Rows read from one source, R of them, as text.

    Attributes:
      source: the path or Hub name, for messages.
      columns: column name -> R strings. A missing value is the empty string.
      lines: R line numbers. CSV and JSON: the line where the record starts; Parquet and Hub: the row, from 1; folder:
        the file's number in sorted order, from 1. Rows that come from one list of documents share a line.
      bad: rows that could not be read, in the order of the file.
    """

    source: str
    columns: dict[str, list[str]]
    lines: list[int]
    bad: list[BadRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lines)


def read_table(section: DataSection, path: str, split: str, columns: list[str]) -> Table:
    """Reads the named columns of a file, a folder of .txt files, or a Hub dataset.

    Numbers and booleans become text as JSON spells them (`true`, `2.5`), except that a whole number stored as a float
    is written without its fraction: the class 1.0 is `1`. A text, prompt, completion or label may be a list of strings
    (JSON lines, Parquet): it becomes one row per string, and the row's single values are repeated beside each.

    Args:
      section: says which columns may hold lists, and the `subset` of a Hub dataset.
      path: an existing file or folder, or else a Hub name.
      split: the split of a Hub dataset; not used for files.
      columns: the columns to read, each once.

    Raises:
      SottoError: SOT200 the source does not exist; SOT201 it cannot be read; SOT202 it holds no rows; SOT203 a column
        is missing or stands twice; SOT204 a folder without .txt files; SOT205 a Hub dataset that cannot be loaded;
        SOT206 a format that Sotto does not read.
    """
    wanted = list(dict.fromkeys(columns))
    rows, source = _open(section, path, split, wanted)
    # A unit that is a list would put one text under several people, and removing one of them would leave it there.
    may_be_list = {section.text, section.text_pair, section.label, section.prompt, section.completion}
    table = Table(source=source, columns={name: [] for name in wanted}, lines=[])
    available: dict[str, None] = {}
    header_checked = False
    for row in rows:
        if row.header is not None and not header_checked:
            _check_columns(wanted, row.header, source)
            header_checked = True
        elif row.values is None:
            table.bad.append(BadRow(row.line, row.problem))
        else:
            if row.header is None and len(available) < SHOWN_NAMES:
                available.update(dict.fromkeys(row.values))
            _append(table, row, wanted, may_be_list)
    if not table.lines and not table.bad:
        raise _no_rows(source)
    if not header_checked and available:
        _check_columns([w for w in wanted if not any(table.columns[w])], list(available), source)
    return table


def _append(table: Table, row: Row, wanted: list[str], may_be_list: set[str | None]) -> None:
    """Adds one record, as several rows if it holds lists, or as a bad row."""
    assert row.values is not None
    values: dict[str, str | list[str]] = {}
    for name in wanted:
        value = formats.as_text(row.values.get(name))
        if value is None or (isinstance(value, list) and name not in may_be_list):
            table.bad.append(BadRow(row.line, "not text"))
            return
        values[name] = value
    if not all(
        formats.is_unicode(v) for value in values.values() for v in ([value] if isinstance(value, str) else value)
    ):
        table.bad.append(BadRow(row.line, formats.NOT_UTF8))
        return
    counts = {len(value) for value in values.values() if isinstance(value, list)}
    if len(counts) > 1:
        table.bad.append(BadRow(row.line, "lists of different lengths"))
        return
    count = counts.pop() if counts else 1
    if count == 0:
        table.bad.append(BadRow(row.line, EMPTY))
        return
    for name, value in values.items():
        table.columns[name].extend(value if isinstance(value, list) else [value] * count)
    table.lines.extend([row.line] * count)


TEXT_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": formats.read_csv,
    ".tsv": formats.read_tsv,
    ".jsonl": formats.read_json,
    ".ndjson": formats.read_json,
    ".json": formats.read_json,
}


def _open(section: DataSection, path: str, split: str, columns: list[str]) -> tuple[Iterator[Row], str]:
    """Chooses the reader. Returns its rows, not yet read, and a name for messages."""
    local = Path(path).expanduser()
    suffix = local.suffix.lower()
    try:
        if local.is_dir():
            return formats.read_folder(_documents(local)), str(local)
        exists = local.exists()
    except OSError as error:
        raise formats.unreadable(local, error.strerror or str(error)) from None
    if exists and suffix in TEXT_READERS:
        return TEXT_READERS[suffix](local), str(local)
    if exists and suffix == ".parquet":
        return formats.read_parquet(local, columns), str(local)
    if exists:
        raise _unknown_format(path)
    if _names_a_file(path, local):
        raise _missing(local)
    return formats.read_hub(path, section.subset, split, columns), f"{path} ({split})"


def require_there(path: str) -> None:
    """Raises SOT200 for a file that is not there, without reading one that is. A Hub dataset is not asked for."""
    local = Path(path).expanduser()
    if not local.exists() and _names_a_file(path, local):
        raise _missing(local)


def _names_a_file(path: str, local: Path) -> bool:
    """Whether what is not there was meant to be a file, and not a dataset of the Hub."""
    suffixes = (*TEXT_READERS, ".parquet", ".txt", ".gz", ".zip", ".xlsx")
    # A name in a folder that is here is a misspelt file. Asking the Hub for it would take long, and tell it the name.
    in_a_folder = "/" in path and local.parent.is_dir()
    return local.suffix.lower() in suffixes or local.is_absolute() or not HUB_NAME.match(path) or in_a_folder


def _documents(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".txt" and p.is_file() and p.name[0] != ".")
    if not files:
        raise SottoError(
            "SOT204",
            what="the folder holds no .txt file",
            where=str(folder),
            why="a folder is read as one document per .txt file",
            fix="name the data file itself, or a folder of .txt files",
        )
    return files


def _check_columns(wanted: list[str], header: list[str], source: str) -> None:
    for name in wanted:
        if header.count(name) > 1:
            raise SottoError(
                "SOT203",
                what=f"the column '{name}' stands {header.count(name)} times",
                where=f"{source} (header)",
                why="it is not clear which of them is meant",
                fix="rename one of them",
            )
        if name not in header:
            raise SottoError(
                "SOT203",
                what=f"there is no column '{name}'.{did_you_mean(name, header)}",
                where=source,
                why="the configuration names it",
                fix=f"columns that exist: {_names(header)}",
            )


def _names(header: list[str]) -> str:
    """A list of names for a message. Cut short: a file without a header would show its first row here."""
    shown = [
        name if len(name) <= SHOWN_CHARACTERS else name[:SHOWN_CHARACTERS] + "..." for name in header[:SHOWN_NAMES]
    ]
    more = f" and {len(header) - SHOWN_NAMES} more" if len(header) > SHOWN_NAMES else ""
    return ", ".join(shown) + more + ". (The first line must hold the names of the columns.)"


def _missing(path: Path) -> SottoError:
    folder: Any = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    hint = did_you_mean(path.name, names) if names or folder.is_dir() else f" There is no folder '{folder}' either."
    return SottoError(
        "SOT200",
        what=f"there is no file '{path}'.{hint}",
        where=str(path.absolute()),
        why="the configuration names it as data",
        fix="correct the path; relative paths start from the folder where the command runs",
    )


def _unknown_format(path: str) -> SottoError:
    return SottoError(
        "SOT206",
        what=f"the format '{Path(path).suffix or 'without a suffix'}' is not one that Sotto reads",
        where=path,
        why="the format is taken from the suffix: "
        + ", ".join((*TEXT_READERS, ".parquet"))
        + ", or a folder of .txt files",
        fix="save it as one of these; one document per line of a JSON-lines file is the safest",
    )


def _no_rows(source: str) -> SottoError:
    return SottoError(
        "SOT202",
        what="there are no rows",
        where=source,
        why="nothing can be learned from an empty file",
        fix="check that it is the right file, and that the first line holds the names of the columns",
    )

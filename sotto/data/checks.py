"""The dataset doctor: what is in the data, what was left out and why, and what makes training senseless.

A report holds counts and line numbers, never text. They are computed from private data without noise, so a report is
for the people who may see the data: nothing of it belongs in an exported artefact.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sotto.config import DataSection, PrivacySection
from sotto.data.examples import Examples
from sotto.data.records import CUT, BadRow, Table
from sotto.data.units import Units
from sotto.errors import SottoError

SHOWN_LINES = 20


@dataclass(frozen=True)
class BadRows:
    """How many rows have one problem, and the lines of the first ones."""

    count: int
    lines: list[int]


@dataclass(frozen=True)
class DataReport:
    """Counts over one dataset.

    Attributes:
      source: the path or Hub name.
      rows: rows found, those that could not be read included.
      rows_used: rows that can be used, before the contribution bound.
      examples: tokenised examples, before the contribution bound.
      tokens: in all of these examples together.
      bad_rows: reason -> count and first lines.
      units: privacy units found.
      unit_examples: (min, median, max) examples per unit, after the contribution bound.
      dropped_examples: examples that the contribution bound left out.
      shared_texts: texts, each counted once, that stand under more than one unit: removing one unit leaves them.
      class_counts: class -> used examples; None for generation.
      warnings: sentences for the user.
    """

    source: str
    rows: int
    rows_used: int
    examples: int
    tokens: int
    bad_rows: dict[str, BadRows]
    units: int
    unit_examples: tuple[int, float, int]
    dropped_examples: int
    shared_texts: int
    class_counts: dict[str, int] | None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "unit_examples": list(self.unit_examples)}

    def render(self) -> str:
        """Short lines of plain text, without text of the data."""
        low, median, high = self.unit_examples
        lines = [
            f"data       {self.source}",
            f"rows       {self.rows:,} found, {self.rows_used:,} usable",
            f"examples   {self.examples:,} ({self.tokens:,} tokens)",
            f"units      {self.units:,}; examples per unit: min {low}, median {median:g}, max {high}",
        ]
        if self.dropped_examples:
            lines.append(f"dropped    {self.dropped_examples:,} examples over max_examples_per_unit")
        if self.class_counts is not None:
            lines.append("classes    " + ", ".join(f"{name}: {count:,}" for name, count in self.class_counts.items()))
        for reason, group in self.bad_rows.items():
            label = "cut" if reason == CUT else "bad rows"
            lines.append(f"{label:<11}{group.count:,} x {reason}: {_lines(group.lines, group.count)}")
        lines += [f"warning    {warning}" for warning in self.warnings]
        return "\n".join(lines)


def check(
    table: Table,
    examples: Examples,
    units: Units,
    section: DataSection,
    *,
    bad: list[BadRow],
    dropped_examples: int = 0,
    unit_values: list[str] | None = None,
    privacy: PrivacySection | None = None,
    expected_batch_size: int | None = None,
) -> DataReport:
    """Counts, and stops where training would be senseless.

    Args:
      table: the rows as read.
      examples: as `encode` gave them.
      units: the units over `examples`.
      section: what the columns mean, and what to do with bad rows.
      bad: what `encode` reported; `table.bad` is added to it here.
      dropped_examples: as `Units.build` counted them.
      unit_values: the unit of each row, or None if each row is its own.
      privacy: for training data; None for evaluation data, which is not checked against a budget.
      expected_batch_size: for training data.

    Raises:
      SottoError: SOT210 there are unusable rows and `bad_rows` is `stop`; SOT211 no row can be used; SOT212 all
        training examples are of one class; SOT213 there are fewer units than the expected batch size.
    """
    everything = sorted([*table.bad, *bad], key=lambda row: row.line)
    groups = _group(everything)
    _stop_on_bad_rows(table, section, everything)
    if len(examples) == 0:
        raise _nothing_usable(table, groups)
    class_counts = _class_counts(examples, section)
    if privacy is not None:
        _check_classes(table, class_counts)
    _check_enough_units(table, len(units), expected_batch_size)
    sizes = units.sizes
    shared = _shared_texts(table, section, {int(r) for r in examples.rows}, unit_values)
    return DataReport(
        source=table.source,
        rows=len(table) + len(table.bad),
        rows_used=len(table) - sum(row.reason != CUT for row in bad),
        examples=len(examples),
        tokens=len(examples.input_ids),
        bad_rows=groups,
        units=len(units),
        unit_examples=(int(sizes.min()), float(np.median(sizes)), int(sizes.max())),
        dropped_examples=dropped_examples,
        shared_texts=shared,
        class_counts=class_counts,
        warnings=_warnings(len(units), dropped_examples, shared, class_counts, unit_values, privacy),
    )


def _group(bad: list[BadRow]) -> dict[str, BadRows]:
    lines: dict[str, list[int]] = defaultdict(list)
    for row in bad:
        lines[row.reason].append(row.line)
    return {reason: BadRows(len(found), sorted(set(found))[:SHOWN_LINES]) for reason, found in sorted(lines.items())}


def _lines(lines: list[int], count: int) -> str:
    return ("line " if count == 1 else "lines ") + ", ".join(map(str, lines)) + (", ..." if count > len(lines) else "")


def _stop_on_bad_rows(table: Table, section: DataSection, bad: list[BadRow]) -> None:
    unusable = [row for row in bad if row.reason != CUT]
    if section.bad_rows == "stop" and unusable:
        first = ", ".join(f"line {row.line} ({row.reason})" for row in unusable[:SHOWN_LINES])
        raise SottoError(
            "SOT210",
            what=f"{len(unusable)} rows cannot be used: {first}{', ...' if len(unusable) > SHOWN_LINES else ''}",
            where=table.source,
            why="data.bad_rows is 'stop'",
            fix="correct these lines, or set data.bad_rows: skip",
        )


def _nothing_usable(table: Table, groups: dict[str, BadRows]) -> SottoError:
    reasons = "; ".join(f"{group.count} x {reason}" for reason, group in groups.items()) or "the rows hold no text"
    return SottoError(
        "SOT211",
        what="not one row can be used",
        where=table.source,
        why=reasons,
        fix="check that the columns are the right ones, and that data.labels is spelled as in the file",
    )


def _class_counts(examples: Examples, section: DataSection) -> dict[str, int] | None:
    if examples.labels is None or section.labels is None:
        return None
    counts = np.bincount(examples.labels, minlength=len(section.labels))
    return {name: int(count) for name, count in zip(section.labels, counts, strict=True)}


def _check_enough_units(table: Table, found: int, expected_batch_size: int | None) -> None:
    if expected_batch_size is not None and found < expected_batch_size:
        raise SottoError(
            "SOT213",
            what=f"the data has {found} units, and run.expected_batch_size is {expected_batch_size}",
            where=f"{table.source}; run.expected_batch_size",
            why="no step could draw as many units as it is expected to draw",
            fix="lower run.expected_batch_size (and correct privacy.num_units), or bring more data",
        )


def _check_classes(table: Table, class_counts: dict[str, int] | None) -> None:
    present = [name for name, count in (class_counts or {}).items() if count]
    if class_counts is not None and len(present) == 1:
        raise SottoError(
            "SOT212",
            what=f"every usable row is of the class '{present[0]}'",
            where=f"{table.source}; data.label",
            why="from one class there is nothing to learn",
            fix="check data.label and data.labels, or bring rows of the other classes",
        )


def _shared_texts(table: Table, section: DataSection, rows: set[int], unit_values: list[str] | None) -> int:
    """Texts that stand under several units. Letter case and white space do not count; digests are kept, not texts."""
    names = (section.text, section.text_pair, section.prompt, section.completion)
    columns = [table.columns[name] for name in names if name]
    first_unit: dict[bytes, str | int] = {}
    shared: set[bytes] = set()
    for row in sorted(rows):
        text = "\0".join(" ".join(column[row].casefold().split()) for column in columns)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        unit = row if unit_values is None else unit_values[row]
        if first_unit.setdefault(digest, unit) != unit:
            shared.add(digest)
    return len(shared)


def _warnings(
    found: int,
    dropped: int,
    shared: int,
    class_counts: dict[str, int] | None,
    unit_values: list[str] | None,
    privacy: PrivacySection | None,
) -> list[str]:
    warnings: list[str] = []
    absent = [name for name, count in (class_counts or {}).items() if count == 0]
    if absent:
        warnings.append("no example of the class " + ", ".join(f"'{name}'" for name in absent))
    if privacy is None:
        return warnings
    if dropped:
        warnings.append(
            f"{dropped:,} examples are over max_examples_per_unit and are not used"
            + (
                ": of a document longer than max_length, unit: record uses one piece"
                if privacy.unit == "record"
                else ""
            )
        )
    declared = privacy.num_units
    if abs(found - declared) > 0.1 * declared:
        warnings.append(
            f"privacy.num_units says {declared:,}, the data has {found:,}: batches will be "
            f"{'larger' if found > declared else 'smaller'} than expected_batch_size (the guarantee holds all the same)"
        )
    if privacy.private and privacy.delta >= 1 / declared:
        warnings.append(
            f"privacy.delta is {privacy.delta:g}, not below 1/num_units = {1 / declared:.2g}: "
            "it would allow one unit to be exposed whole"
        )
    if shared:
        warnings.append(f"{shared:,} texts stand under more than one unit: removing one unit does not remove them")
    spelled = Counter(name.casefold() for name in set(unit_values or ()) if name)
    alike = sum(count for count in spelled.values() if count > 1)
    if alike:
        warnings.append(f"{alike:,} units differ from another in upper and lower case only: are they the same person?")
    return warnings

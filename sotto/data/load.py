"""The one entry point: from a configuration to examples, units and a report."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from sotto.config import Config, DataSection
from sotto.data.checks import DataReport, check
from sotto.data.encode import encode
from sotto.data.examples import Examples
from sotto.data.records import Table, read_table
from sotto.data.units import Units, clean_units
from sotto.errors import SottoError

TEXT_ROLES = ("text", "text_pair", "prompt", "completion")


@dataclass(frozen=True)
class LoadedData:
    """A dataset that is ready for training or evaluation.

    Attributes:
      examples: E tokenised examples.
      units: the privacy units over them, after the contribution bound. For evaluation: one per example. With
        `unit: record` a unit is a row; of plain text that is a document.
      report: private counts; see `DataReport`.
      fingerprint: see `fingerprint`.
    """

    examples: Examples
    units: Units
    report: DataReport
    fingerprint: str


def has_eval(section: DataSection) -> bool:
    """Whether the configuration names evaluation data: a file, or another split of the training dataset."""
    return section.eval is not None or section.eval_split is not None


def load_dataset_for(
    config: Config, tokenizer: PreTrainedTokenizerBase, which: Literal["train", "eval"], whole: bool = True
) -> LoadedData:
    """Reads, tokenises, groups and checks the training or the evaluation data.

    Args:
      whole: False for a part of the training data, such as one device's: few units, or one class, are then no error.

    For evaluation the units are single examples: there is no contribution bound, the unit's column need not exist, and
    nothing is checked against the privacy section.

    Raises:
      SottoError: SOT214 no evaluation data is configured; those of `read_table`, `encode` and `check`.
    """
    section, training = config.data, which == "train"
    path, split = (section.train, section.split) if training else _eval_source(section)
    unit = config.privacy.unit if training and config.privacy.unit != "record" else None
    roles = _roles(section, unit)
    table = read_table(section, path, split, list(roles.values()))
    unit_values = clean_units(table.columns[unit]) if unit is not None else None
    examples, bad = encode(table, section, tokenizer, unit_values)
    example_units = _example_units(examples, section, unit_values, training)
    most = config.privacy.max_examples_per_unit
    units, dropped = Units.build(example_units, len(examples), most, config.run.seed)
    report = check(
        table,
        examples,
        units,
        section,
        bad=bad,
        dropped_examples=dropped,
        unit_values=unit_values,
        privacy=config.privacy if training and whole else None,
        expected_batch_size=config.run.expected_batch_size if training and whole else None,
    )
    return LoadedData(examples, units, report, fingerprint(table, roles))


def fingerprint(table: Table, roles: dict[str, str]) -> str:
    """SHA-256 of the text, in hex: the multiset of rows that could be read, in the columns that hold text.

    Labels, the unit's column, the file's name, place and format and the order of rows do not matter: two runs on the
    same people's words must meet in one ledger even when they learn different labels. It is no key and has no salt:
    whoever guesses the whole data can confirm the guess with it. It does not belong in an exported artefact.

    Args:
      table: the rows.
      roles: role (`text`, `label`, `unit`, ...) -> column.
    """
    columns = [table.columns[roles[role]] for role in TEXT_ROLES if role in roles]
    digests = []
    for values in zip(*columns, strict=True):
        digest = hashlib.sha256()
        for value in values:
            encoded = value.encode()
            # The length keeps ("ab", "c") and ("a", "bc") apart.
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def ledger_id(config: Config, content: str) -> str:
    """The name of the ledger that a run is charged to: the dataset, and the unit that is protected.

    Runs that protect different units have ledgers of their own, because their epsilons do not add up.

    Args:
      content: the fingerprint; `privacy.dataset` takes its place when it is given.
    """
    unit = re.sub(r"[^A-Za-z0-9_-]+", "-", config.privacy.unit)[:40]
    return f"{config.privacy.dataset or content[:32]}.{unit}"


def _roles(section: DataSection, unit: str | None) -> dict[str, str]:
    """Role -> column, for the columns that the task uses."""
    named = {
        "text": section.text,
        "text_pair": section.text_pair,
        "label": section.label,
        "prompt": section.prompt,
        "completion": section.completion,
        "unit": unit,
    }
    return {role: column for role, column in named.items() if column is not None}


def _example_units(
    examples: Examples, section: DataSection, unit_values: list[str] | None, training: bool
) -> list[str] | list[int] | None:
    """The unit of each example, or None if each example is its own unit."""
    if unit_values is not None:
        return [unit_values[row] for row in examples.rows]
    packed = section.task == "generation" and section.completion is None
    if training and packed:
        # A long document gives several chunks. The record that is protected is the document, so they are one unit,
        # and with a bound of one example a single piece of it is used.
        return [int(row) for row in examples.rows]
    return None


def _eval_source(section: DataSection) -> tuple[str, str]:
    if not has_eval(section):
        raise SottoError(
            "SOT214",
            what="no evaluation data is configured",
            where="data.eval",
            why="evaluation on the training data would say nothing, and would not be private",
            fix="set data.eval to a held-out file, or data.eval_split to a split of the Hub dataset",
        )
    return section.eval or section.train, section.eval_split or section.split

"""WHO is protected: which examples belong to one privacy unit, and how many of them may be used.

Formal guarantees of `Units.build`:
  - Every example belongs to at most one unit, and no unit has more than `max_per_unit` examples.
  - Which examples of a unit are kept depends on the seed and on that unit alone (its name if it has one, and how many
    examples it has). Adding or removing another unit changes nothing for this one. So bounding contributions this way
    does not widen the difference between neighbouring datasets.
  - Names of units are not kept.
What is not covered: one person who stands under two names is two units. `checks.py` warns of names that differ only in
upper and lower case.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass

import numpy as np


def clean_units(values: list[str]) -> list[str]:
    """Names of units in one spelling: Unicode NFC, without surrounding white space. A missing name is `""`.

    Two spellings of one person would be two units, each protected alone; making them one only widens the protection.
    """
    return [unicodedata.normalize("NFC", value).strip() for value in values]


@dataclass(frozen=True)
class Units:
    """U privacy units over the examples of a dataset.

    Attributes:
      offsets: (U+1,) int64; unit u has the members `members[offsets[u]:offsets[u+1]]`.
      members: int64 example indices, ascending within a unit. Each example stands here at most once.
    """

    offsets: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """(U,) number of examples of each unit."""
        return np.diff(self.offsets)

    def members_of(self, unit_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The examples of some units, in the order of the units. Cost O(examples returned).

        Args:
          unit_indices: (K,) indices into the units, each at most once.

        Returns:
          (B,) example indices, and (B,) the unit index (as given) that each belongs to.
        """
        unit_indices = np.asarray(unit_indices, dtype=np.int64)
        starts = self.offsets[unit_indices]
        counts = self.offsets[unit_indices + 1] - starts
        return self.members[ranges(starts, counts)], np.repeat(unit_indices, counts)

    @classmethod
    def build(
        cls, example_units: list[str] | list[int] | None, num_examples: int, max_per_unit: int, seed: int
    ) -> tuple[Units, int]:
        """Groups examples by unit and applies the contribution bound.

        Args:
          example_units: the unit of each example: names, none of them empty (`encode` leaves such rows out); or row
            numbers, where a unit is a row; or None if every example is a unit of its own.
          num_examples: E.
          max_per_unit: at most this many examples of a unit are kept, chosen at random within the unit.
          seed: chooses which. Not secret.

        Returns:
          The units, in the order in which they first appear, and how many examples the bound dropped.
        """
        if max_per_unit < 1:
            raise ValueError("max_per_unit must be at least 1")
        if example_units is None:
            return cls(np.arange(num_examples + 1, dtype=np.int64), np.arange(num_examples, dtype=np.int64)), 0
        if len(example_units) != num_examples or "" in example_units:
            raise ValueError("one unit per example, none of them empty")
        groups: dict[str | int, list[int]] = {}
        for example, unit in enumerate(example_units):
            groups.setdefault(unit, []).append(example)
        kept = [_bounded(unit, examples, max_per_unit, seed) for unit, examples in groups.items()]
        offsets = np.concatenate([[0], np.cumsum([len(k) for k in kept])]).astype(np.int64)
        members = np.concatenate([np.zeros(0, np.int64), *kept]).astype(np.int64)
        return cls(offsets, members), num_examples - len(members)


def _bounded(unit: str | int, examples: list[int], most: int, seed: int) -> np.ndarray:
    """At most `most` of a unit's examples, ascending. The choice knows nothing of other units."""
    if len(examples) <= most:
        return np.asarray(examples, dtype=np.int64)
    # A row's number depends on the rows before it, that is on other units: it must not enter the choice.
    name = f"\1{unit}" if isinstance(unit, str) else "\0"
    digest = hashlib.blake2b(f"{seed}{name}".encode(), digest_size=16, person=b"sotto.units").digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))
    return np.asarray(examples, dtype=np.int64)[np.sort(generator.permutation(len(examples))[:most])]


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The concatenation of `arange(start, start + count)`, without a Python loop."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total, dtype=np.int64)

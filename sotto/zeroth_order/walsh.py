"""Which rows of a Walsh-Hadamard matrix the directions of a step are, so that a run does not look twice the same way.

The matrix has a column for every entry that is drawn, tensor after tensor, and a power of two of rows. Row r has at
column e the sign (-1)^(number of ones in r AND e); two rows are orthogonal. Steps take groups of K rows, in an order
that the run's key gives, until no group is left. That is one cycle; the next has other random signs on the columns
(`directions`) and another order of groups. Within a group each row has a random sign of its own: without them the mean
of a group's rows would be zero but on one column in K, and what is told apart from that mean (`probes`) would never
move those.

Everything is integer arithmetic on words of 32 signs, a set bit for -1, and a function of (key, step, k, column).

Shape legend: w words of a tensor, K directions of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from sotto.zeroth_order import counter, laws

_ALL = 0xFFFFFFFF


class Stream(NamedTuple):
    """What the signs of one direction on one tensor follow from.

    Attributes:
      key, step, index: of the words, as for `counter.words`.
      row: the number of the row of the matrix without its lowest five bits; -1 for signs that are the words alone.
      low: the signs on 32 columns that those five bits give, as a word.
      first_word: where the tensor begins in the matrix, in words.
      places: the key of the words that say which sizes the entries have (`laws`); None for signs.
      stretch: what the entries are multiplied with.
    """

    key: int
    step: int
    index: int
    row: int = -1
    low: int = 0
    first_word: int = 0
    places: int | None = None
    stretch: float = 1.0

    def words(self, first: int, last: int) -> counter.Words:
        """(w,) words `first` to `last`, with the signs of the row, on the CPU."""
        words_w = counter.words(self.key, self.step, self.index, first, last)
        return words_w if self.row < 0 else self.signed(words_w, np.arange(first, last) + self.first_word)

    def signed(self, words_w: counter.Words, number_w: laws.Integers) -> counter.Words:
        """(w,) words with the signs of the row, which depend on their numbers in the matrix."""
        if self.row < 0:
            return words_w
        parity_w = np.bitwise_count(number_w & self.row) & 1
        return words_w ^ np.uint32(self.low) ^ (parity_w.astype(np.uint32) * np.uint32(_ALL))

    def pieces(
        self, start: int, stop: int, room: laws.Floats, factor: float = 1.0
    ) -> Iterator[tuple[int, int, laws.Floats]]:
        """Entries `start` to `stop` times a factor, on the CPU: `laws.pieces`. All their words are drawn at once."""
        words_w = self.words(start // laws.PER_WORD, -(-stop // laws.PER_WORD))
        return laws.pieces(words_w, self.sizes(start, stop), start, stop, room, self.stretch, factor)

    def sizes(self, start: int, stop: int) -> laws.Sizes | None:
        """Those of the entries from number `start` to `stop`; None where they are signs."""
        if self.places is None:
            return None
        runs = laws.runs(start, stop)
        return laws.Sizes(runs, counter.words(self.places, self.step, self.index, runs.start, runs.stop))


class Rows:
    """The rows of a run.

    Attributes:
      count: how many rows the matrix has.
    """

    def __init__(self, key: str, sizes: Mapping[str, int], probes: int):
        """Lays the tensors out; draws nothing.

        Args:
          key: of the run.
          sizes: tensor name -> entries that are drawn for it.
          probes: K.
        """
        self._first_word: dict[str, int] = {}
        words = 0
        for name in sorted(sizes):
            self._first_word[name] = words
            words += -(-sizes[name] // 32)
        self._group = 1 << (probes - 1).bit_length()
        self.count = max(self._group, 1 << (32 * words - 1).bit_length())
        self._groups, self._probes, self._key = self.count // self._group, probes, key
        self._steps: dict[int, tuple[int, int]] = {}

    def cycle(self, step: int) -> int:
        return step // self._groups

    def row(self, step: int, k: int) -> int:
        """The number of a direction's row."""
        return self._step(step)[0] * self._group + k

    def is_flipped(self, step: int, k: int) -> bool:
        """Whether a direction is its row times -1."""
        return bool(self._step(step)[1] >> k & 1)

    def _step(self, step: int) -> tuple[int, int]:
        """The number of a step's group, and a bit for each of its rows."""
        if step not in self._steps:
            self._steps.clear()
            cycle, place = divmod(step, self._groups)
            a, b = counter.words(counter.stream_key(self._key, "", "groups"), cycle, 0, 0, 2).tolist()
            # An odd factor, so that every group comes once.
            group = ((2 * a + 1) * place + b) % self._groups
            drawn = counter.words(counter.stream_key(self._key, "", "flips"), step, 0, 0, -(-self._probes // 32))
            flips = sum(word << 32 * i for i, word in enumerate(drawn.tolist()))
            self._steps[step] = group, flips
        return self._steps[step]

    def stream(self, name: str, key: int, step: int, k: int) -> Stream:
        """A direction on a tensor, whose words have this key."""
        place = self.row(step, k) >> 5, self._low(step, k), self._first_word[name]
        return Stream(key, self.cycle(step), 0, *place)

    def signs_on_device(self, name: str, step: int, k: int, word_w: torch.Tensor) -> torch.Tensor:
        """A direction's signs on some words of a tensor, on any device: (..., w) int64 -> the same, in [0, 2^32)."""
        common = (word_w + self._first_word[name]) & (self.row(step, k) >> 5)
        for half in (32, 16, 8, 4, 2, 1):  # folded until the lowest bit is the parity of all
            common = common ^ (common >> half)
        return (common & 1) * _ALL ^ self._low(step, k)

    def _low(self, step: int, k: int) -> int:
        word = _low_signs(self.row(step, k) & 31)
        return word ^ _ALL if self.is_flipped(step, k) else word


def examples(sizes: Mapping[str, int]) -> Iterator[dict[str, Stream]]:
    """A direction on tensors of these sizes under each law of entries, for comparing other ways to make them."""
    keys = {name: counter.stream_key("0" * 32, name, "entry") for name in sizes}
    rows, step, k = Rows("0" * 32, sizes, 3), 5, 2
    yield {name: Stream(key, step, k) for name, key in keys.items()}
    yield {name: rows.stream(name, key, step, k) for name, key in keys.items()}
    yield {name: Stream(key, step, k, places=key ^ 1, stretch=0.5) for name, key in keys.items()}


@functools.cache
def _low_signs(low: int) -> int:
    """The signs on 32 columns whose number is a multiple of 32 and agrees with the row nowhere above its lowest five
    bits, which are these."""
    return sum(((low & b).bit_count() & 1) << b for b in range(32))

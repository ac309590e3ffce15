"""From random words to the entries of a direction, without rounding: every entry is an integer times a power of two.

A direction only has to have mean zero and identity covariance and to be independent of the data (Zhang et al. 2024,
arXiv:2310.09639, remark after equation 3). Entry laws:

* `rademacher`: +1 or -1, one bit each. The cheapest, and of all such laws the one with the least variance.
* `gaussian`: such a sign times a size. Sizes are the 65,536 quantiles of a half-normal law, in an order without
  pattern; each run of 16,384 entries takes as many of them one after another, from a place that is drawn for it. No
  logarithm or cosine, whose last bits differ between libraries, and no random word for each entry, which would cost
  more than all else together. Every entry alone has the normal law, up to 5e-6 in its characteristic function at
  frequencies below 5, and up to 4.5 in size; two entries of different runs are independent; two of one run have
  independent signs, and their sizes are two different ones of the table: the mean product of their squares is within
  3.1 % of 1.

Both are integers times 2^-20 (or 1), exact in float32, so squares can be added up exactly in any order.

Shape legend: w words, e entries, r runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from sotto.zeroth_order import counter

PER_WORD = 32
"""Signs that one word gives."""
RUN = 1 << 14
"""Entries whose sizes stand one after another in the table."""
SIZES = 1 << 16
"""How many sizes there are."""

SCALE = 2.0**-20
Floats = np.ndarray[Any, np.dtype[np.float32]]
Integers = np.ndarray[Any, np.dtype[np.int64]]


@functools.cache
def sizes() -> Integers:
    """(SIZES,) quantiles of the half-normal law at the middle of equal shares, in units of `SCALE`; mean square 1."""
    normal = NormalDist()
    upper = np.fromiter((normal.inv_cdf(0.5 + (i + 0.5) / (2 * SIZES)) for i in range(SIZES)), np.float64, SIZES)
    stretch = math.sqrt(SIZES / math.fsum(upper * upper)) / SCALE
    order = np.argsort(counter.words(counter.stream_key("", "order of sizes"), 0, 0, 0, SIZES), kind="stable")
    return np.rint(stretch * upper).astype(np.int64)[order]


@functools.cache
def sizes_from_any_place() -> Floats:
    """(SIZES + RUN,) the sizes, and the first of them once more."""
    table = sizes().astype(np.float32) * np.float32(SCALE)
    return np.concatenate([table, table[:RUN]])


@functools.cache
def sizes_on(device: torch.device) -> torch.Tensor:
    """(SIZES + RUN,) float32: the sizes, and the first of them once more."""
    return torch.from_numpy(sizes_from_any_place()).to(device)  # pyright: ignore[reportUnknownMemberType]


@functools.cache
def _squares() -> Integers:
    """(SIZES + RUN + 1,) sums of the squares of all sizes before, in units of `SCALE`^2; below 2^58."""
    return np.concatenate([[0], np.cumsum(np.square(np.concatenate([sizes(), sizes()[:RUN]])))])


def runs(start: int, stop: int) -> range:
    """Numbers of the runs that have some of these entries."""
    return range(start // RUN, -(-stop // RUN))


def places(words_r: Any) -> Any:
    """Where in the table runs begin, from a word of each."""
    return words_r & (SIZES - 1)


@functools.lru_cache(maxsize=8)  # a third of a MiB each
def stretched(stretch: float, factor: float) -> Floats:
    """(SIZES + RUN,) the sizes times one number and then another, rounded after each."""
    return _times(sizes_from_any_place(), stretch, factor)


def _times(numbers: Floats, stretch: float, factor: float) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):  # weights that grew too large are no news here, as in torch
        return numbers * np.float32(stretch) * np.float32(factor)


class Sizes:
    """The sizes of the entries in some runs, on the CPU."""

    def __init__(self, runs: range, words_r: counter.Words):
        """
        Args:
          runs: their numbers, one after another.
          words_r: a word for each of them, which says where its sizes begin in the table.
        """
        self._runs, self._place_r = runs, places(words_r).astype(np.int64)

    def give(self, signs_e: Floats, start: int, stretch: float = 1.0, factor: float = 1.0) -> None:
        """Turns signs, of the entries from number `start` on, into entries times one number and another; in place."""
        table, stop = stretched(stretch, factor), start + len(signs_e)
        for run in runs(start, stop):
            first, last = max(start, run * RUN), min(stop, (run + 1) * RUN)
            part_e = signs_e[first - start : last - start]
            skip = int(self._place_r[run - self._runs.start]) + first - run * RUN
            np.multiply(part_e, table[skip : skip + last - first], out=part_e)

    def squares(self, size: int) -> int:
        """Sum of the squares of the first `size` entries of the first of the runs on, in units of `SCALE`^2."""
        ends_r = self._place_r + np.minimum(RUN, size - RUN * np.arange(len(self._place_r)))
        found_r = _squares()[ends_r] - _squares()[self._place_r]
        # Each is below 2^56, their sum need not fit into 64 bits.
        return (int((found_r >> 28).sum()) << 28) + int((found_r & ((1 << 28) - 1)).sum())


@functools.lru_cache(maxsize=64)
def sign_table(stretch: float, factor: float) -> Floats:
    """(256, 8): for every byte, a sign for each of its bits, the lowest first; times one number and then another."""
    bytes_n1 = np.arange(256, dtype=np.uint8)[:, None]
    found = 1 - 2 * np.unpackbits(bytes_n1, axis=1, bitorder="little").astype(np.float32)
    return _times(found, stretch, factor)


def as_bytes(words_w: counter.Words) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(4 w,) the bytes of words, the lowest of each first."""
    return words_w.astype("<u4", copy=False).view(np.uint8)


def signs(words_w: counter.Words, room: Floats | None = None, stretch: float = 1.0, factor: float = 1.0) -> Floats:
    """(w,) words -> (w * PER_WORD,) signs in float32, times one number and another.

    Args:
      room: where they are written.
    """
    bytes_n = as_bytes(words_w)
    target = None if room is None else room[: 8 * bytes_n.size].reshape(-1, 8)
    return (
        sign_table(stretch, factor).take(bytes_n, axis=0, out=target, mode="clip").reshape(-1)
    )  # no byte is out of range


def pieces(
    words_w: counter.Words, sizes: Sizes | None, start: int, stop: int, room: Floats, stretch: float, factor: float
) -> Iterator[tuple[int, int, Floats]]:
    """Entries `start` to `stop` times one number and another, in parts that fit into a room: (first, last, entries).

    Args:
      words_w: of their signs, from the word on that entry `start` is in.
      room: filled again for each part; its length is a multiple of PER_WORD.
    """
    begin, size = start - start % PER_WORD, len(room)
    bytes_n, room_n8 = as_bytes(words_w), room.reshape(-1, 8)
    table = sign_table(stretch, factor) if sizes is None else sign_table(1.0, 1.0)
    for first in range(begin, stop, size):
        some_n = bytes_n[(first - begin) // 8 :][: size // 8]
        table.take(some_n, axis=0, out=room_n8[: len(some_n)], mode="clip")  # no byte is out of range
        low, high = max(first, start), min(first + size, stop)
        part_e = room[low - first : high - first]
        if sizes is not None:
            sizes.give(part_e, low, stretch, factor)
        yield low, high, part_e


def signs_on_device(words_xw: torch.Tensor) -> torch.Tensor:
    """(..., w) int64 words on any device -> (..., w * PER_WORD) float32. The same numbers as `signs`."""
    bits = torch.arange(32, dtype=torch.int32, device=words_xw.device)
    # The 32 bits as a signed number, which takes half of the memory: shifted and masked they are the same.
    signed_xw = (words_xw - ((words_xw & (1 << 31)) << 1)).to(torch.int32)
    found = (signed_xw[..., None] >> bits).bitwise_and_(1).flatten(-2).float()
    return found.mul_(-2).add_(1)

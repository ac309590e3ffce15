"""From random words to the entries of a direction, without rounding: every entry is an integer times a power of two.

A direction only has to have mean zero and identity covariance and to be independent of the data (Zhang et al. 2024,
arXiv:2310.09639, remark after equation 3). Entry laws:

* `rademacher`: +1 or -1, one bit each. The cheapest, and of all such laws the one with the least variance.
* `gaussian`: the sum of two draws from a table of 65,536 normal quantiles, scaled to variance one. 2^32 equally likely
  pairs, largest entry 6.1; its characteristic function is that of the normal up to 1.1e-5. No logarithm or cosine,
  whose last bits differ between libraries.

Both are integers times 2^-20 (or 1), exact in float32, so squares can be added up exactly in any order.

Shape legend: w words, e entries.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from sotto.zeroth_order import counter

ENTRIES = {"rademacher": 32, "gaussian": 1}
"""Entries that one word gives."""

SCALE = 2.0**-20
_HALF = 1 << 15
_Floats = np.ndarray[Any, np.dtype[np.float32]]


@functools.cache
def quantiles() -> np.ndarray[Any, np.dtype[np.int32]]:
    """(65536,) quantiles of N(0, 1/2) at the middle of equal shares, in units of `SCALE`; their variance is 1/2."""
    normal = NormalDist()
    upper = [normal.inv_cdf(0.5 + (i + 0.5) / (2 * _HALF)) for i in range(_HALF)]
    stretch = math.sqrt(_HALF / math.fsum(x * x for x in upper)) / math.sqrt(2) / SCALE
    table = np.array([round(stretch * x) for x in upper], dtype=np.int32)
    return np.concatenate([-table[::-1], table])


@functools.cache
def _signs() -> _Floats:
    """(256, 8): for every byte, a sign for each of its bits, the lowest first."""
    bytes_n1 = np.arange(256, dtype=np.uint8)[:, None]
    return 1 - 2 * np.unpackbits(bytes_n1, axis=1, bitorder="little").astype(np.float32)


@functools.cache
def _quantiles_on(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(quantiles()).to(device)  # pyright: ignore[reportUnknownMemberType]


def floats(law: str, words_w: counter.Words, room: _Floats | None = None) -> _Floats:
    """(w,) words -> (w * ENTRIES[law],) entries in float32.

    Args:
      room: where signs are written, 32 for each word.
    """
    if law == "gaussian":
        table = quantiles()
        drawn = table.take(words_w & np.uint32(0xFFFF))
        drawn += table.take(words_w >> np.uint32(16))
        return drawn.astype(np.float32) * np.float32(SCALE)
    bytes_n = words_w.astype("<u4", copy=False).view(np.uint8)
    target = None if room is None else room[: 8 * bytes_n.size].reshape(-1, 8)
    return _signs().take(bytes_n, axis=0, out=target, mode="clip").reshape(-1)  # no byte is out of range


def floats_on_device(law: str, words_xw: torch.Tensor) -> torch.Tensor:
    """(..., w) int64 words on any device -> (..., w * ENTRIES[law]) float32. The same numbers as `floats`."""
    if law == "gaussian":
        table = _quantiles_on(words_xw.device)
        return (table[words_xw & 0xFFFF] + table[words_xw >> 16]).float() * SCALE
    bits = torch.arange(32, dtype=torch.int32, device=words_xw.device)
    # The 32 bits as a signed number, which takes half of the memory: shifted and masked they are the same.
    signed_xw = (words_xw - ((words_xw & (1 << 31)) << 1)).to(torch.int32)
    signs = (signed_xw[..., None] >> bits).bitwise_and_(1).flatten(-2).float()
    return signs.mul_(-2).add_(1)

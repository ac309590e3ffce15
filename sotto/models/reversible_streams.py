"""The arithmetic of two coupled streams: how one step is made, and how it is undone.

A step takes the older stream u, the newer one v and y, what the layer made of v:

    u <- y + factor * (u - v)

It can be undone, because v is still there and the layer can be run on it again. But dividing by a small factor
magnifies rounding, by 1 / factor for each layer. Two ways out:

`fixed`: streams are fixed-point numbers in int64, the factor is 2^-8, and the eight bits that the shift would lose are
kept, one byte per number and layer. Undoing is exact, bit for bit, at any depth (bits kept beside a reversible
computation: Maclaurin et al. 2015, arXiv 1502.03492; MacKay et al. 2018, arXiv 1810.10999).

`float64`, `float32`: floating-point streams, and every few layers an anchor, where both are stored and the undoing
starts anew. The layers compute in float32, so in float64 the error stays in digits that no layer sees.

Shape legend: all tensors here are (B, T, d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

FRACTION_BITS, LIMIT = 40, 2.0**22
"""Fixed point: resolution 9e-13; values beyond the limit are cut. Hidden states of language models stay below 1e5."""


@dataclass(frozen=True)
class FixedPoint:
    """Streams in int64. `bits`: the factor is 2^-bits."""

    bits: int

    @property
    def factor(self) -> float:
        return 2.0**-self.bits

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float64, copy=True).nan_to_num_(0.0, LIMIT, -LIMIT).clamp_(-LIMIT, LIMIT)
        return wide.mul_(2.0**FRACTION_BITS).round_().to(torch.int64)

    def read(self, raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return raw.double().mul_(2.0**-FRACTION_BITS).to(dtype)

    def step(self, u: torch.Tensor, v: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the new stream, and the bits that it does not hold."""
        difference = u - v
        lost = (difference & (2**self.bits - 1)).to(torch.uint8)
        return (difference >> self.bits) + self.enter(y), lost

    def undo(self, new: torch.Tensor, v: torch.Tensor, y: torch.Tensor, lost: Any) -> torch.Tensor:
        return ((new - self.enter(y) << self.bits) | lost.to(torch.int64)) + v

    def error(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        return 0.0 if torch.equal(found, expected) else _relative(self.read(found, torch.float64), expected, self)


@dataclass(frozen=True)
class Floating:
    """Streams in `dtype`. The factor is a power of two, so that scaling by it is exact."""

    dtype: torch.dtype
    factor: float

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)

    def read(self, raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return raw.to(dtype, copy=True)  # what is read gets a graph; what is kept must have none

    def step(self, u: torch.Tensor, v: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.enter(y) + self.factor * (u - v), None

    def undo(self, new: torch.Tensor, v: torch.Tensor, y: torch.Tensor, lost: Any) -> torch.Tensor:
        return (new - self.enter(y)) / self.factor + v

    def error(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        return _relative(found, expected, self)


Streams = FixedPoint | Floating


def _relative(found: torch.Tensor, expected: torch.Tensor, streams: Streams) -> float:
    """Largest difference relative to the largest value. Values that are not finite are nobody's error."""
    wanted = streams.read(expected, torch.float64)
    difference = (found.double() - wanted)[torch.isfinite(wanted)].abs()
    if difference.numel() == 0:
        return 0.0
    largest = float(wanted[torch.isfinite(wanted)].abs().max())
    return float(difference.nan_to_num(torch.inf).max()) / max(largest, 1e-30)

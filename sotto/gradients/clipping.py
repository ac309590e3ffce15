"""How one unit's gradient is scaled before it enters the sum.

A clipping gives each unit a coefficient from its norm alone. `sensitivity` bounds the norm of any scaled unit, and so
how far the sum can move when one unit is added or removed. A unit whose norm is not finite gets coefficient zero: it
changes nothing, and nobody can tell from an exception that it was there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Clipping(Protocol):
    """What the engine needs to know about a clipping."""

    @property
    def sensitivity(self) -> float: ...

    def coefficients(self, norms_U: torch.Tensor) -> torch.Tensor:
        """(U,) norms -> (U,) factors with `factor * norm <= sensitivity`; zero where the norm is not finite."""
        ...


@dataclass(frozen=True)
class Flat:
    """Scale down to `clip_norm`, never up: `min(1, C / |g|)` (Abadi et al. 2016, arXiv 1607.00133)."""

    clip_norm: float

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

    def coefficients(self, norms_U: torch.Tensor) -> torch.Tensor:
        factors = torch.clamp(self.clip_norm / torch.clamp(norms_U, min=torch.finfo(norms_U.dtype).tiny), max=1.0)
        return _zero_where_not_finite(factors, norms_U)


@dataclass(frozen=True)
class Automatic:
    """Normalise every unit: `C / (|g| + gamma)` (AUTO-S, Bu et al. 2022, arXiv 2206.07136). C only sets the scale."""

    clip_norm: float
    gamma: float = 0.01

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

    def coefficients(self, norms_U: torch.Tensor) -> torch.Tensor:
        return _zero_where_not_finite(self.clip_norm / (norms_U + self.gamma), norms_U)


@dataclass(frozen=True)
class Unclipped:
    """No bound at all, for runs without privacy. Its sensitivity is infinite, so no mechanism accepts the sum."""

    sensitivity: float = float("inf")

    def coefficients(self, norms_U: torch.Tensor) -> torch.Tensor:
        return _zero_where_not_finite(torch.ones_like(norms_U), norms_U)


def _zero_where_not_finite(factors_U: torch.Tensor, norms_U: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isfinite(norms_U), factors_U, torch.zeros_like(factors_U))


CLIPPINGS = {"flat": Flat, "automatic": Automatic}

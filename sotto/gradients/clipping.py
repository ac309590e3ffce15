"""How one unit's gradient is scaled before it enters the sum.

A clipping gives each unit a coefficient from its norm alone: one for the whole gradient, or, `layerwise`, one for each
layer. `sensitivity` bounds the norm of any scaled unit, and so how far the sum can move when one unit is added or
removed. A gradient whose norm is not finite gets coefficient zero: it changes nothing, and nobody can tell from an
exception that it was there.

Shape legend: U units, G groups of parameters that are clipped together; G is 1 unless the clipping is layer-wise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Clipping(Protocol):
    """What the engine needs to know about a clipping."""

    @property
    def sensitivity(self) -> float: ...

    def group_of(self, names: Iterable[str]) -> dict[str, int]:
        """Parameter name -> the group it is clipped with, 0..G-1."""
        ...

    def coefficients(self, norms_UG: torch.Tensor) -> torch.Tensor:
        """(U, G) norms -> (U, G) factors; zero where the norm is not finite.

        For every unit, the norms times their factors, read as one vector, have at most the norm `sensitivity`.
        """
        ...


def by_layer(names: Iterable[str]) -> dict[str, int]:
    """One group for each module that owns parameters: a layer's weight is clipped together with its bias."""
    layers: dict[str, int] = {}
    return {name: layers.setdefault(name.rpartition(".")[0], len(layers)) for name in names}


@dataclass(frozen=True)
class Flat:
    """Scale down to `clip_norm`, never up: `min(1, C / |g|)` (Abadi et al. 2016, arXiv 1607.00133).

    Layer-wise, each of G layers is scaled down to `C / sqrt(G)` (McMahan et al. 2018, arXiv 1710.06963, per-layer
    clipping): together at most C again.
    """

    clip_norm: float
    layerwise: bool = False

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

    def group_of(self, names: Iterable[str]) -> dict[str, int]:
        return by_layer(names) if self.layerwise else dict.fromkeys(names, 0)

    def threshold(self, norms_UG: torch.Tensor) -> float:
        return self.clip_norm / math.sqrt(norms_UG.shape[-1]) if self.layerwise else self.clip_norm

    def coefficients(self, norms_UG: torch.Tensor) -> torch.Tensor:
        return _scale_down(norms_UG, self.threshold(norms_UG))


@dataclass(frozen=True)
class Automatic(Flat):
    """Normalise every unit: `C / (|g| + gamma)` (AUTO-S, Bu et al. 2022, arXiv 2206.07136). C only sets the scale."""

    gamma: float = 0.01

    def coefficients(self, norms_UG: torch.Tensor) -> torch.Tensor:
        return _zero_where_unusable(self.threshold(norms_UG) / (norms_UG + self.gamma), norms_UG)


@dataclass
class Adaptive:
    """Flat clipping whose threshold follows a quantile of the norms (Andrew et al. 2021, arXiv 1905.03871, section 2).

    Each step releases, with noise, the fraction of units that were *not* clipped at this step's threshold; after the
    step the threshold is multiplied by `exp(-learning_rate * (fraction - quantile))`. The noisy fraction is part of the
    step's release and paid for (`AdaptiveGaussianMechanism`); what follows from it is post-processing, so thresholds
    are public. Layer-wise, each layer has its own (He et al. 2022, arXiv 2212.01539).

    Attributes:
      clip_norm: the threshold to start from; layer-wise, that of all layers together.
      quantile: which part of the units should stay unclipped, in (0, 1).
      thresholds: (G,) current thresholds; empty until the parameters are known.
    """

    clip_norm: float
    layerwise: bool = False
    quantile: float = 0.5
    learning_rate: float = 0.2
    thresholds: list[float] = field(default_factory=list)

    @property
    def sensitivity(self) -> float:
        return math.hypot(*self.thresholds) if self.thresholds else self.clip_norm

    def group_of(self, names: Iterable[str]) -> dict[str, int]:
        groups = by_layer(names) if self.layerwise else dict.fromkeys(names, 0)
        count = max(groups.values()) + 1
        if len(self.thresholds) != count:
            self.thresholds = [self.clip_norm / math.sqrt(count)] * count
        return groups

    def coefficients(self, norms_UG: torch.Tensor) -> torch.Tensor:
        return _scale_down(norms_UG, self._thresholds(norms_UG))

    def count_unclipped(self, norms_UG: torch.Tensor) -> torch.Tensor:
        """(G,) sums over units of +1/2 where the norm is within the threshold and -1/2 where not.

        Centred, because adding or removing a unit then moves each sum by 1/2 and not by 1. A norm that is not finite
        counts as clipped.
        """
        within_UG = norms_UG <= self._thresholds(norms_UG)
        return within_UG.double().sum(0) - norms_UG.shape[0] / 2

    def follow(self, fraction_G: torch.Tensor) -> None:
        """Moves the thresholds after a step, given the noisy fractions of unclipped units. Fractions are public."""
        exponents = (-self.learning_rate * (fraction_G.double() - self.quantile)).clamp(-1, 1).tolist()
        self.thresholds = [c * math.exp(e) for c, e in zip(self.thresholds, exponents, strict=True)]

    def _thresholds(self, norms_UG: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.thresholds or [self.clip_norm], dtype=norms_UG.dtype, device=norms_UG.device)


@dataclass(frozen=True)
class Unclipped:
    """No bound at all, for runs without privacy. Its sensitivity is infinite, so no mechanism accepts the sum."""

    sensitivity: float = float("inf")
    layerwise: bool = False

    def group_of(self, names: Iterable[str]) -> dict[str, int]:
        return by_layer(names) if self.layerwise else dict.fromkeys(names, 0)

    def coefficients(self, norms_UG: torch.Tensor) -> torch.Tensor:
        return _zero_where_unusable(torch.ones_like(norms_UG), norms_UG)


def _scale_down(norms_UG: torch.Tensor, threshold: Any) -> torch.Tensor:
    factors = torch.clamp(threshold / torch.clamp(norms_UG, min=torch.finfo(norms_UG.dtype).tiny), max=1.0)
    return _zero_where_unusable(factors, norms_UG)


def _zero_where_unusable(factors_UG: torch.Tensor, norms_UG: torch.Tensor) -> torch.Tensor:
    """Zero for units that are not finite, and for factors so small that float32 would round them, perhaps up."""
    usable_UG = torch.isfinite(norms_UG) & (factors_UG >= torch.finfo(torch.float32).tiny)
    return torch.where(usable_UG, factors_UG, torch.zeros_like(factors_UG))


CLIPPINGS: dict[str, type[Flat] | type[Adaptive]] = {"flat": Flat, "automatic": Automatic, "adaptive": Adaptive}

"""The one type that every way of computing a clipped sum returns.

Everything after a `ClippedSum` (noise, optimizer, checkpoint, report) does not know how it was obtained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass
class ClippedSum:
    """The sum over privacy units of their clipped gradients.

    Attributes:
      gradients: parameter name -> tensor of the parameter's shape, float32 or better. Every trainable parameter is
        present; one that no example of the batch reached holds zeros.
      norms: (U,) gradient norm of each unit before clipping, in the order of the unit's first row in the batch. Private
        values: never export them. A unit whose gradient is not finite has norm inf or nan and contributed zero.
      sensitivity: an upper bound of how much `gradients`, read as one vector, can change in L2 norm when one unit is
        added or removed. (When one is replaced: twice this.)
    """

    gradients: dict[str, torch.Tensor]
    norms: torch.Tensor
    sensitivity: float

    def __iadd__(self, other: ClippedSum) -> ClippedSum:
        """Adds, in place, the sum over other units. The two must be disjoint: a unit in both would count twice."""
        if self.sensitivity != other.sensitivity or self.gradients.keys() != other.gradients.keys():
            raise ValueError("these sums were not clipped by the same engine")
        for name, value in self.gradients.items():
            value += other.gradients[name]
        self.norms = torch.cat([self.norms, other.norms.to(self.norms.device)])
        return self

    @classmethod
    def zeros(cls, parameters: Mapping[str, torch.Tensor], sensitivity: float) -> ClippedSum:
        """The sum over no units at all: what an empty Poisson batch contributes."""
        zeros = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
            for name, p in parameters.items()
        }
        return cls(zeros, torch.zeros(0), sensitivity)

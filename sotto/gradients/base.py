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
        present; one that no example of the batch reached holds zeros. (`zeroth_order` has one tensor, of shape (K,).)
      group_norms: (U, G) gradient norm of each unit before clipping, in the order of the unit's first row in the batch,
        for each group of parameters that is clipped on its own; G is 1 unless clipping is layer-wise. Private values:
        never export them. Where a norm is inf or nan the unit contributed zero.
      sensitivity: an upper bound of how much `gradients`, read as one vector, can change when one unit is added or
        removed. (When one is replaced: twice this.)
      order: the norm that `sensitivity` bounds: 2, or 1, which bounds the other one too.
    """

    gradients: dict[str, torch.Tensor]
    group_norms: torch.Tensor
    sensitivity: float
    order: int = 2

    @property
    def norms(self) -> torch.Tensor:
        """(U,) norm of each unit's whole gradient before clipping. Private values."""
        return self.group_norms.square().sum(1).sqrt() if self.group_norms.shape[1] != 1 else self.group_norms[:, 0]

    def __iadd__(self, other: ClippedSum) -> ClippedSum:
        """Adds, in place, the sum over other units. The two must be disjoint: a unit in both would count twice."""
        alike = (self.sensitivity, self.order) == (other.sensitivity, other.order)
        if not alike or self.gradients.keys() != other.gradients.keys():
            raise ValueError("these sums were not clipped by the same engine")
        for name, value in self.gradients.items():
            value += other.gradients[name]
        self.group_norms = torch.cat([self.group_norms, other.group_norms.to(self.group_norms.device)])
        return self

    @classmethod
    def zeros(cls, parameters: Mapping[str, torch.Tensor], sensitivity: float, groups: int = 1) -> ClippedSum:
        """The sum over no units at all: what an empty Poisson batch contributes."""
        zeros = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
            for name, p in parameters.items()
        }
        return cls(zeros, torch.zeros(0, groups, dtype=torch.float64), sensitivity)

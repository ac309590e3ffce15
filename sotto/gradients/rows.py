"""Which rows of a batch belong to which privacy unit, and how a tensor's rows map to them.

Shape legend: B rows (examples) of the batch, U units, K most rows of one unit, T everything between the batch and the
feature dimension, d and p features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """The grouping of a batch's rows into units.

    Attributes:
      unit_of_B: (B,) unit index of each row, 0..U-1 in the order of first appearance.
      slots_UK: (U, K) row indices of each unit, -1 where it has fewer than K; None when each row is a unit of its own.
    """

    unit_of_B: torch.Tensor
    num_units: int
    slots_UK: torch.Tensor | None

    @classmethod
    def build(cls, num_rows: int, units: torch.Tensor | None, device: torch.device) -> Rows:
        if units is None:
            return cls(torch.arange(num_rows, device=device), num_rows, None)
        _, inverse, counts = torch.unique(units.to(device), return_inverse=True, return_counts=True)
        first = torch.full((len(counts),), num_rows, device=device).scatter_reduce(
            0, inverse, torch.arange(num_rows, device=device), "amin"
        )
        order = torch.argsort(first)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=device)
        unit_of_B, counts = rank[inverse], counts[order]
        if bool((counts == 1).all()):
            return cls(unit_of_B, num_rows, None)
        slots = torch.full((len(counts), int(counts.max())), -1, device=device)
        sorted_rows = torch.argsort(unit_of_B, stable=True)
        starts = torch.cumsum(counts, 0) - counts
        place = torch.arange(num_rows, device=device) - torch.repeat_interleave(starts, counts)
        slots[unit_of_B[sorted_rows], place] = sorted_rows
        return cls(unit_of_B, len(counts), slots)

    @property
    def num_rows(self) -> int:
        return len(self.unit_of_B)

    def members(self, unit: int) -> torch.Tensor:
        """Row indices of one unit."""
        return torch.nonzero(self.unit_of_B == unit).flatten()

    def concatenate(self, x_BTd: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (U, K*T, d): a unit's rows one after another along T, zeros where it has fewer than K."""
        if self.slots_UK is None:
            return x_BTd
        num_units, most = self.slots_UK.shape
        gathered = x_BTd[self.slots_UK.clamp(min=0)]
        # Not a product with a mask: row 0 stands in for padding, and 0 * inf would be nan.
        gathered = gathered.masked_fill((self.slots_UK < 0)[..., None, None], 0)
        return gathered.reshape(num_units, most * x_BTd.shape[1], x_BTd.shape[2])

    def add_up(self, x_B: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (U, ...): the sum over each unit's rows."""
        if self.slots_UK is None:
            return x_B
        flat = x_B.flatten(1)  # index_add_ is far slower with more dimensions
        summed = flat.new_zeros((self.num_units, flat.shape[1])).index_add_(0, self.unit_of_B, flat)
        return summed.view(self.num_units, *x_B.shape[1:])

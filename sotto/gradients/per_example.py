"""The oracle: one backward pass per unit. Slow, obviously right, and what every other algorithm is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sotto.gradients import passes
from sotto.gradients.base import ClippedSum
from sotto.gradients.pieces import wide
from sotto.gradients.rows import Rows

if TYPE_CHECKING:
    from sotto.gradients.engine import Engine


def run(engine: Engine, losses: torch.Tensor, rows: Rows) -> ClippedSum:
    names = list(engine.parameters)
    total = engine.zeros()
    squared_U = torch.zeros(rows.num_units, dtype=torch.float64, device=losses.device)
    known_U = torch.zeros_like(squared_U)
    known_U[rows.unit_of_B[~torch.isfinite(losses.detach())]] = torch.nan
    for unit in range(rows.num_units):
        grads = passes.one_unit(engine, losses, names, rows, unit, retain=unit + 1 < rows.num_units)
        squared_U[unit] = known_U[unit] + sum(wide(g).double().square().sum() for g in grads.values())
        factor = engine.clipping.coefficients(squared_U[unit].sqrt()[None])[0]
        if factor > 0:
            for name, g in grads.items():
                total.gradients[name] += factor.to(total.gradients[name].dtype) * wide(g)
    passes.require_isolated(known_U, squared_U)
    return ClippedSum(total.gradients, squared_U.sqrt(), engine.clipping.sensitivity)

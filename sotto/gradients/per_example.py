"""The oracle: one backward pass per unit. Slow, obviously right, and what every other algorithm is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sotto.gradients import passes
from sotto.gradients.base import ClippedSum
from sotto.gradients.rows import Rows

if TYPE_CHECKING:
    from sotto.gradients.engine import Engine


def run(engine: Engine, losses: torch.Tensor, rows: Rows) -> ClippedSum:
    names = list(engine.parameters)
    total = engine.zeros()
    squared_UG = engine.no_norms(rows)
    known_U = torch.zeros_like(squared_UG[:, 0])
    known_U[rows.unit_of_B[~torch.isfinite(losses.detach())]] = torch.nan
    for unit in range(rows.num_units):
        grads = passes.one_unit(engine, losses, names, rows, unit, retain=unit + 1 < rows.num_units)
        squared_UG[unit] = known_U[unit]
        passes.add_squares(squared_UG[unit], grads, engine.group_of)
        factor_G = engine.clipping.coefficients(squared_UG[unit].sqrt()[None])[0]
        passes.add_scaled(total.gradients, grads, factor_G, engine.group_of)
    passes.require_isolated(known_U, squared_UG.sum(1))
    return ClippedSum(total.gradients, squared_UG.sqrt(), engine.clipping.sensitivity)

"""Ghost clipping: a backward pass for norms, then a second one of the losses weighted by the clipping factors.

Keeps nothing between the two but the graph itself (Li et al. 2021, arXiv 2110.05679).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sotto.gradients import passes
from sotto.gradients.base import ClippedSum
from sotto.gradients.rows import Rows

if TYPE_CHECKING:
    from sotto.gradients.engine import Engine


def run(engine: Engine, losses: torch.Tensor, rows: Rows) -> ClippedSum:
    book = passes.record(engine, losses, rows, engine.book(rows, keep=False), retain=True)
    norms_UG = book.squared_UG.sqrt()  # one group: `attach` refuses others, which would need one pass for each
    factor_UG = engine.clipping.coefficients(norms_UG)
    norms_U, factor_U = norms_UG[:, 0], factor_UG[:, 0]
    bad_U = ~torch.isfinite(norms_U)
    any_bad = bool(bad_U.any())
    bad_B = bad_U[rows.unit_of_B] if any_bad else None
    grads = passes.weighted(engine, losses, factor_U[rows.unit_of_B], bad_B)
    total = {name: grad for name, grad in grads.items() if not (any_bad and name in engine.slow)}
    if any_bad:  # an untapped operation cannot mask a non-finite example: leave such units out one by one
        passes.add_slow(engine, losses, rows, factor_UG, total)
    return ClippedSum(passes.complete(engine, total), norms_UG, engine.clipping.sensitivity)

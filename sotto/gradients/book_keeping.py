"""Book-keeping: one backward pass that keeps each layer's `(a, g)`, then one weighted product per layer.

About the time of non-private training (Bu et al. 2022, arXiv 2210.00038).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sotto.gradients import passes
from sotto.gradients.base import ClippedSum
from sotto.gradients.pieces import accumulate
from sotto.gradients.rows import Rows

if TYPE_CHECKING:
    from sotto.gradients.engine import Engine


def run(engine: Engine, losses: torch.Tensor, rows: Rows) -> ClippedSum:
    book = passes.record(engine, losses, rows, engine.book(rows, keep=True), retain=False)
    norms_UG = book.squared_UG.sqrt()
    factor_UG = engine.clipping.coefficients(norms_UG)
    bad_UG = ~torch.isfinite(norms_UG)
    any_bad = bool(bad_UG.any())
    total: dict[str, torch.Tensor] = {}
    for name in list(book.kept):
        group = engine.group_of[name]
        bad_U = bad_UG[:, group] if any_bad else None
        uses = book.kept.pop(name)
        while uses:  # popped, so that each pair is freed as soon as it is used
            accumulate(total, name, uses.pop().weighted_sum(factor_UG[:, group], rows, bad_U))
    passes.add_slow(engine, losses, rows, factor_UG, total)
    return ClippedSum(passes.complete(engine, total), norms_UG, engine.clipping.sensitivity)

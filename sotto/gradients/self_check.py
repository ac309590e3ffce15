"""The numerical check on the first batch of every run: the engine against one unit at a time, on the real model.

Each unit is run *alone*, with nothing attached, through plain autograd. If its gradient differs from what the engine
found for it inside the batch, then either a rule is wrong or the examples influence one another; both would break the
guarantee, so nothing may be released. Cost: a few forward and backward passes of a few examples, once per run, and
again whenever a module turns out to need another rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sotto.errors import SottoError
from sotto.gradients import passes
from sotto.gradients.base import ClippedSum
from sotto.gradients.engine import Engine
from sotto.gradients.rows import Rows

Losses = Callable[[torch.Tensor], torch.Tensor]


def verify(engine: Engine, losses_of: Losses, units_B: torch.Tensor, tolerance: float | None = None) -> float:
    """Compares the engine with plain autograd on a few units.

    Args:
      engine: attached to the model.
      losses_of: runs the model on the given rows, an integer tensor, and returns one loss for each.
      units_B: (B,) unit of each row.
      tolerance: largest relative difference of norms and of the sum; by default 1e-3, and 5e-2 under autocast.

    Returns:
      The largest relative difference found.

    Raises:
      SottoError: it is above the tolerance.
    """
    everyone = torch.arange(len(units_B), device=units_B.device)
    with torch.no_grad():
        expected = _one_at_a_time(engine, losses_of, Rows.build(len(units_B), units_B, units_B.device))
    worst = 0.0
    for _ in range(2 + len(engine.sites)):  # again while parameters are handed on from one rule to the next
        before = engine.arrangement
        with torch.enable_grad():
            total = engine.backward(losses_of(everyone), units_B)
        with torch.no_grad():
            worst = max(worst, _compare(total, expected, units_B, tolerance))
        if engine.arrangement == before:
            break
    engine.verified = engine.arrangement
    return worst


def _compare(total: ClippedSum, expected: ClippedSum, units_B: torch.Tensor, tolerance: float | None) -> float:
    finite = torch.isfinite(expected.norms)
    alike = total.norms.shape == expected.norms.shape and torch.equal(torch.isfinite(total.norms), finite)
    differences = {"norms": _relative(total.norms[finite], expected.norms[finite]) if alike else math.inf}
    scale = _largest(expected) / max(1, len(expected.gradients)) ** 0.5
    for name, value in expected.gradients.items():
        difference = (total.gradients[name] - value).norm() / torch.clamp(value.norm(), min=1e-3 * scale + 1e-30)
        differences[name] = float(difference) if bool(torch.isfinite(difference)) else math.inf  # max() passes over nan
    worst = max(differences, key=lambda key: differences[key])
    limit = tolerance if tolerance is not None else (5e-2 if torch.is_autocast_enabled(units_B.device.type) else 1e-3)
    if not differences[worst] <= limit:
        raise SottoError(
            "SOT610",
            what=f"the gradient of a unit inside the batch differs from its gradient alone by {differences[worst]:.2g}",
            where=f"'{worst}'",
            why=f"more than {limit:g}: examples influence one another, or a rule is wrong for this model; "
            "either would void the guarantee, so nothing was released",
            fix="try method.gradient: per_example; if that fails too, the model couples examples",
        )
    return differences[worst]


def _one_at_a_time(engine: Engine, losses_of: Losses, rows: Rows) -> ClippedSum:
    parameters, total, squared_UG = engine.parameters, engine.zeros(), engine.no_norms(rows)
    with engine.paused(), torch.enable_grad():
        for unit in range(rows.num_units):
            losses = losses_of(rows.members(unit))
            grads = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
            found = {name: g for name, g in zip(parameters, grads, strict=True) if g is not None}
            with torch.no_grad():
                passes.add_squares(squared_UG[unit], found, engine.group_of)
                factor_G = engine.clipping.coefficients(squared_UG[unit].sqrt()[None])[0]
                passes.add_scaled(total.gradients, found, factor_G, engine.group_of)
    return ClippedSum(total.gradients, squared_UG.sqrt(), total.sensitivity)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    if len(expected) == 0:
        return 0.0
    largest = float(((found - expected).abs() / expected.clamp(min=1e-12)).max())
    return largest if math.isfinite(largest) else math.inf


def _largest(total: ClippedSum) -> float:
    return float(torch.stack([g.norm() for g in total.gradients.values()]).norm())

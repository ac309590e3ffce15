"""What the gradient tests compare with: plain autograd on the bare model, one privacy unit at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sotto.gradients.base import ClippedSum
from sotto.gradients.engine import Engine, attach

Losses = Callable[[torch.Tensor], torch.Tensor]
FAST = ("ghost", "book_keeping")
ALGORITHMS = ("per_example", *FAST)
UNEVEN = torch.tensor([7, 2, 7, 7, 5])
"""Five rows in three units: of three rows (not next to one another), one and one."""


@dataclass
class Oracle:
    """Per-unit gradients, their norms and the sum of the clipped ones."""

    gradients: list[dict[str, torch.Tensor]]
    norms: torch.Tensor
    clipped: dict[str, torch.Tensor]
    clip_norm: float


def groups_of(num_rows: int, units: torch.Tensor | None) -> list[list[int]]:
    if units is None:
        return [[i] for i in range(num_rows)]
    found: dict[int, list[int]] = {}
    for row, unit in enumerate(units.tolist()):
        found.setdefault(unit, []).append(row)
    return list(found.values())


def oracle(model: nn.Module, losses_of: Losses, num_rows: int, units: torch.Tensor | None = None) -> Oracle:
    """Runs each unit's rows alone. The clipping norm is the median, so that some units are clipped and others not."""
    attached = [getattr(m.__dict__.get("forward"), "sotto_engine", False) for m in model.modules()]
    assert not any(attached), "an engine is attached"
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for group in groups_of(num_rows, units):
        loss = losses_of(torch.tensor(group)).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found.append(
            {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}
        )
    norms = torch.stack([vector(grads).norm() for grads in found])
    finite = torch.isfinite(norms)
    clip_norm = float(norms[finite].median())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for grads, norm in zip(found, norms, strict=True):
        if torch.isfinite(norm):
            for name in total:
                total[name] += grads[name] * min(1.0, clip_norm / max(float(norm), 1e-300))
    return Oracle(found, norms, total, clip_norm)


def vector(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.detach().double().flatten() for g in gradients.values()])


def differences(total: ClippedSum, expected: Oracle) -> tuple[float, float]:
    """Largest relative difference of a norm, and of the whole clipped sum."""
    assert total.gradients.keys() == expected.clipped.keys()
    assert all(total.gradients[n].shape == g.shape for n, g in expected.clipped.items())
    finite = torch.isfinite(expected.norms)
    assert torch.equal(torch.isfinite(total.norms), finite)
    norms = (total.norms - expected.norms).abs() / expected.norms.clamp(min=1e-300)
    found, wanted = vector(total.gradients), vector(expected.clipped)
    return float(norms[finite].max()), float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))


def check(
    model: nn.Module,
    losses_of: Losses,
    num_rows: int,
    *,
    algorithm: str,
    units: torch.Tensor | None = None,
    tolerance: float = 1e-10,
    steps: int = 2,
    slow: set[str] | None = None,
) -> Engine:
    """Asserts that the engine agrees with the oracle on several steps, the first of which is probed.

    Args:
      slow: paths of the modules that must be reported as having no fast rule; None to leave that open.
    """
    expected = oracle(model, losses_of, num_rows, units)
    engine = attach(model, clip_norm=expected.clip_norm, algorithm=algorithm)  # type: ignore[arg-type]
    try:
        for _ in range(steps):
            total = engine.backward(losses_of(torch.arange(num_rows)), units)
            assert total.norms.grad_fn is None
            assert all(g.grad_fn is None for g in total.gradients.values())
            worst = differences(total, expected)
            assert max(worst) < tolerance, worst
        if slow is not None:
            assert {r.path for r in engine.report() if r.slow or r.rule == "rerun"} == slow
    finally:
        engine.detach()
    return engine

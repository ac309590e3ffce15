"""One clipped step as other libraries do it, for `benchmarks/engine.py`. None of them is a dependency of Sotto.

    pip install -r benchmarks/requirements-peers.txt

Each maker takes a model, a function from a model to its (B,) losses, and the batch size. It returns a function that
makes one step and returns what an optimizer would read, so that it is alive while memory is measured. No noise is
added and no weight is moved. The clipping norm is 1.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Losses = Callable[..., torch.Tensor]
Step = Callable[[], Any]


def loop(model: nn.Module, losses: Losses, batch: int) -> Step:
    """One example at a time, written by hand."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> Any:
        total = [torch.zeros_like(p) for p in parameters]
        for row in range(batch):
            grads = torch.autograd.grad(losses(model, slice(row, row + 1)).sum(), parameters, allow_unused=True)
            norm = torch.stack([g.norm() for g in grads if g is not None]).norm()
            factor = float(torch.clamp(1 / norm, max=1.0))
            for sum_, grad in zip(total, grads, strict=True):
                if grad is not None:
                    sum_.add_(grad, alpha=factor)
        return total

    return step


def vmap(model: nn.Module, losses: Losses, batch: int) -> Step:
    """`torch.func`: the gradient function of one example, vectorised."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def one(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        def called(**inputs: Any) -> Any:
            return torch.func.functional_call(model, {**frozen, **parameters}, (), inputs)

        return losses(called, row[None]).sum()

    def step() -> Any:
        rows = torch.arange(batch, device=next(iter(trained.values())).device)
        grads = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0), randomness="different")(trained, rows)
        norms_B = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        factor_B = torch.clamp(1 / norms_B, max=1.0)
        return {name: torch.einsum("b,b...->...", factor_B, grads.pop(name)) for name in list(grads)}

    return step


def opacus_hooks(model: nn.Module, losses: Losses, batch: int) -> Step:
    from opacus.grad_sample import GradSampleModule  # type: ignore
    from opacus.optimizers import DPOptimizer  # type: ignore

    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(
        _sgd(model), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=batch, loss_reduction="sum"
    )

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        losses(module, slice(None)).sum().backward()
        optimizer.clip_and_accumulate()

    return step


def opacus_ghost(model: nn.Module, losses: Losses, batch: int) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping  # type: ignore
    from opacus.optimizers import DPOptimizerFastGradientClipping  # type: ignore
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping  # type: ignore

    module = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=1.0)
    optimizer = DPOptimizerFastGradientClipping(
        _sgd(model), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=batch, loss_reduction="sum"
    )

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = losses(module, slice(None))
        DPTensorFastGradientClipping(module, optimizer, loss, "sum").backward()

    return step


def fastdp(model: nn.Module, losses: Losses, batch: int) -> Step:
    """Book-keeping in its mixed mode."""
    from fastDP import PrivacyEngine  # type: ignore[import-not-found]

    optimizer = _sgd(model)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = PrivacyEngine(
            model, batch_size=batch, sample_size=1000, epochs=1, noise_multiplier=0.0, clipping_mode="MixOpt",
            clipping_fn="Abadi", clipping_style="all-layer", loss_reduction="sum",
        )  # fmt: skip
        engine.attach(optimizer)

    def step() -> Any:
        for p in model.parameters():
            p.grad = None
            if hasattr(p, "private_grad"):
                delattr(p, "private_grad")
        losses(model, slice(None)).sum().backward()

    return step


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)


PEERS: dict[str, tuple[str | None, Callable[[nn.Module, Losses, int], Step]]] = {
    "opacus_hooks": ("opacus", opacus_hooks),
    "opacus_ghost": ("opacus", opacus_ghost),
    "fastdp": ("fastDP", fastdp),
    "vmap": (None, vmap),
    "loop": (None, loop),
}
"""Name -> (the module it needs, its maker)."""

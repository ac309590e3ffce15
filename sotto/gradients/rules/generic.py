"""Any other small leaf module: run it under vmap with a copy of its parameters per example.

RMS norms of every family, convolutions, scale layers. The module's own code runs, one example at a time as far as it
can tell, so its gradient per example is whatever autograd makes of that code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sotto.gradients.pieces import Instantiated, Piece, wide
from sotto.gradients.rows import Rows
from sotto.gradients.rules.contain import untapped
from sotto.gradients.taps import Site

MAX_PARAMETERS = 1 << 18
"""Beyond this, a copy of the parameters per example costs more than the slow path."""

# vmap refuses data-dependent control flow, in-place writes, random numbers, and outputs that are not tensors.
FAILURES = (RuntimeError, ValueError, TypeError)

COUPLING = (nn.modules.batchnorm._BatchNorm,)


def fits(module: nn.Module) -> bool:
    owned = sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
    return next(module.children(), None) is None and owned <= MAX_PARAMETERS


def tap(site: Site) -> Any:
    tried = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal tried
        if not site.active():
            return untapped(site, *args, **kwargs)
        if not tried and not site.state.in_backward:
            tried = True
            if (reason := _unfit(site, args, kwargs)) is not None:
                site.decline(reason)
                return untapped(site, *args, **kwargs)
        try:
            return _per_example(site, args, kwargs)
        except FAILURES as error:
            site.decline(_cannot(error))
            return untapped(site, *args, **kwargs)

    return forward


def _cannot(error: Exception) -> str:
    return f"vmap cannot run it: {str(error).splitlines()[0][:80] if str(error) else type(error).__name__}"


def _unfit(site: Site, args: Any, kwargs: Any) -> str | None:
    """Tries the module without a graph. A module that looks at the whole batch gives another output one by one."""
    with torch.no_grad():
        try:
            found = pytree.tree_leaves(_per_example(site, args, kwargs))
        except FAILURES as error:
            return _cannot(error)
        expected = pytree.tree_leaves(site.original(*args, **kwargs))
    for one, all_ in zip(found, expected, strict=True):
        tolerance = 1e-2 if all_.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if one.shape != all_.shape or not torch.allclose(one, all_, tolerance, tolerance, equal_nan=True):
            return "its output for one example depends on the others"
    return None


def _which_are_mapped(leaves: list[Any], size: int) -> list[bool]:
    """Which inputs hold one row per example. In doubt (a table whose first dimension happens to be B) it gives up."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
    first = next(t for t in tensors if t.dim() > 1)
    mapped = [isinstance(leaf, torch.Tensor) and leaf.shape == first.shape for leaf in leaves]
    if any(t.shape[0] == size and t.shape != first.shape for t in tensors):
        raise RuntimeError("one of several inputs may or may not have a batch dimension")
    return mapped


def _per_example(site: Site, args: Any, kwargs: Any) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    size = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 1), 0)
    if size == 0 or size != site.state.batch_size:
        raise RuntimeError("its input has no batch dimension")
    mapped = _which_are_mapped(leaves, size)
    roles = [role for role in site.module._parameters if site.name(role) is not None]
    if torch.is_grad_enabled():
        site.entering(leaves[mapped.index(True)], *roles)
    copies = {role: _Expand.apply(site.module._parameters[role], size, site, role) for role in roles}

    def one_example(parameters: dict[str, torch.Tensor], *tensors: torch.Tensor) -> Any:
        fed = iter(tensors)
        filled = [next(fed).unsqueeze(0) if is_mapped else leaf for leaf, is_mapped in zip(leaves, mapped, strict=True)]
        inner_args, inner_kwargs = pytree.tree_unflatten(filled, spec)
        with _parameters_replaced(site.module, parameters):
            out = site.original(*inner_args, **inner_kwargs)
        return pytree.tree_map(lambda t: t.squeeze(0) if isinstance(t, torch.Tensor) else t, out)

    tensors = [leaf for leaf, is_mapped in zip(leaves, mapped, strict=True) if is_mapped]
    return torch.vmap(one_example)(copies, *tensors)


@contextmanager
def _parameters_replaced(module: nn.Module, parameters: dict[str, torch.Tensor]) -> Iterator[None]:
    saved = {role: module._parameters[role] for role in parameters}
    module._parameters.update(parameters)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(saved)


class _Expand(torch.autograd.Function):
    """A parameter (*s) as a copy per example (B, *s); its gradient is the per-example gradient itself."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, size: int, site: Site, role: str):
        ctx.site, ctx.role = site, role
        return parameter.detach().expand(size, *parameter.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        g_B = ctx.site.state.isolate(grads[0])

        def pieces(rows: Rows) -> dict[str, Piece]:
            return {ctx.role: Instantiated(rows.add_up(wide(g_B)))}

        if not ctx.site.receive(g_B, pieces):
            return None, None, None, None
        bad_B = ctx.site.state.bad_B
        if bad_B is not None and len(bad_B) == len(g_B):
            g_B = g_B.masked_fill(bad_B.view(-1, *[1] * (g_B.dim() - 1)), 0)
        return g_B.sum(0), None, None, None

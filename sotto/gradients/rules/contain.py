"""Modules without a fast rule: they run as they are, but one example's infinities stay with that example.

Their parameters take the slow path, one backward pass per unit. In such a pass every other example contributes zero
times its activations, which is nan where an activation is not finite. So such values enter the module as zeros, leave
it as nan at the same positions (the example's own loss must not look healthy), and output gradients of other examples
are masked on the way back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from sotto.gradients.taps import Site, State


def tap(site: Site) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        site.decline("no rule for this module: its own backward pass, one unit at a time")
        return untapped(site, *args, **kwargs)

    return forward


def untapped(site: Site, *args: Any, **kwargs: Any) -> Any:
    """What a module runs when it is not tapped."""
    if site.declined is None or site.state.paused or not torch.is_grad_enabled():
        return site.original(*args, **kwargs)
    return contained(site, *args, **kwargs)


def contained(site: Site, *args: Any, **kwargs: Any) -> Any:
    """Runs the original forward on finite inputs."""
    args, kwargs, bad = cleaned(args, kwargs)
    out = spoiled(site.original(*args, **kwargs), bad, whole_rows=False)
    guard(out, site.state)
    return out


def cleaned(args: Any, kwargs: Any) -> tuple[Any, Any, list[torch.Tensor]]:
    """Returns the inputs with zeros for what is not finite, and for each tensor that had some, where they were.

    The places are masks without the last dimension. An attention mask holds -inf on purpose, and is known by having no
    graph and not being the only tensor of its kind.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    floating = [
        i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 1
    ]
    bad = []
    for i in floating:
        x = leaves[i]
        certain = x.requires_grad or len(floating) == 1
        seen = x.detach()  # looking saves nothing for the backward pass
        not_finite = ~torch.isfinite(seen) if certain else torch.isnan(seen) | torch.isposinf(seen)
        if bool(not_finite.any()):
            bad.append(not_finite.any(-1))
            leaves[i] = x.masked_fill(not_finite, 0)
    if not bad:
        return args, kwargs, bad
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs, bad


def spoiled(out: Any, bad: list[torch.Tensor], *, whole_rows: bool) -> Any:
    """Returns the outputs with nan where the inputs were not finite.

    Args:
      whole_rows: dimension 0 is known to be the batch, so outputs without the inputs' other dimensions (a classifier's
        scores) are spoiled as well.
    """

    def one(x: Any, where: torch.Tensor) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        if x.shape[:-1] == where.shape:
            return x.masked_fill(where[..., None], torch.nan)
        if whole_rows and x.dim() > 0 and x.shape[0] == where.shape[0]:
            return x.masked_fill(where.flatten(1).any(1).view(-1, *[1] * (x.dim() - 1)), torch.nan)
        return x

    for where in bad:
        out = pytree.tree_map(lambda x, where=where: one(x, where), out)
    return out


def guard(out: Any, state: State) -> None:
    """Masks the output gradients of other units in passes for one unit alone."""
    for leaf in pytree.tree_leaves(out):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and not leaf.is_leaf:
            leaf.register_hook(state.isolate)

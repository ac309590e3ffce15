"""Per-layer rules: how a module's parameters are tapped.

`rule_for(module)` picks one by what the module's `forward` really is, not by its name: a subclass that overrides
`forward` is handled by intercepting the functional calls that it makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sotto.gradients.rules import embedding, functional, generic, linear, norm
from sotto.gradients.taps import Site

Forward = Callable[..., Any]
Rule = Callable[[Site], Forward]


def rule_for(module: nn.Module) -> tuple[str, Rule | None]:
    """Returns the rule's name and a function from a site to the forward that stands in for the module's own.

    Without such a function the module is one to be run again: `rerun`, which needs to know more than the module.
    """
    # Another library may have put its own forward on the instance; it must go on running.
    forward = module.__dict__.get("forward", type(module).forward)
    if forward is nn.Linear.forward:
        return "linear", linear.tap
    if linear.is_written_out(module) and "forward" not in module.__dict__:
        return "linear", linear.tap
    if linear.is_conv1d(module) and "forward" not in module.__dict__:
        return "linear", linear.tap_conv1d
    if isinstance(module, nn.Embedding):
        embedding.refuse_unsupported(module)
        return "embedding", embedding.tap if forward is nn.Embedding.forward else functional.tap
    if forward is nn.LayerNorm.forward:
        return "layer_norm", norm.tap
    if isinstance(module, nn.Linear):
        return "linear", functional.tap
    if generic.fits(module):
        return "vmap", generic.tap
    return "rerun", None

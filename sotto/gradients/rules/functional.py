"""Subclasses of linear, embedding and norm layers that have a `forward` of their own (scaled, offset, soft-capped).

Their own code runs; the one functional call inside that uses the layer's weight is replaced by its tapped version.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sotto.gradients.rules.contain import untapped
from sotto.gradients.rules.embedding import tapped_embedding
from sotto.gradients.rules.linear import tapped_linear
from sotto.gradients.taps import Site


def tap(site: Site) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not site.active():
            return untapped(site, *args, **kwargs)
        with _Intercept(site):
            return site.original(*args, **kwargs)

    return forward


class _Intercept(TorchFunctionMode):
    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        module = self.site.module
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if weight is not None and weight is module._parameters.get("weight"):
            if func is F.embedding and args and not _renormalises(args, kwargs):
                padding_idx = args[2] if len(args) > 2 else kwargs.get("padding_idx")
                return tapped_embedding(self.site, args[0], padding_idx)
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if func is F.linear and args and bias is module._parameters.get("bias"):
                return tapped_linear(self.site, args[0], False)
        return func(*args, **kwargs)


def _renormalises(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq) mixes examples."""
    named = dict(zip(("max_norm", "norm_type", "scale_grad_by_freq"), args[3:], strict=False)) | kwargs
    return bool(named.get("max_norm") or named.get("scale_grad_by_freq"))

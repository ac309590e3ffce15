"""Layer norm over the last dimensions, with weight and optional bias. RMS norms take the `vmap` rule."""

from __future__ import annotations

from typing import Any

import torch

from sotto.gradients.pieces import Instantiated, Piece, wide
from sotto.gradients.rows import Rows
from sotto.gradients.rules.contain import untapped
from sotto.gradients.rules.linear import plain_inputs
from sotto.gradients.taps import Site, autocast_dtype


def tap(site: Site) -> Any:
    def forward(input: torch.Tensor) -> torch.Tensor:
        if not site.active():
            return untapped(site, input)
        return tapped_layer_norm(site, input)

    return forward


def tapped_layer_norm(site: Site, x: torch.Tensor) -> torch.Tensor:
    """Applies `site.module` to x (B, ..., *normalized_shape), recording under the roles `weight` and `bias`."""
    module = site.module
    if not site.owns(module.weight, module.bias):
        site.decline("its weight is computed from other parameters")
        return untapped(site, x)
    site.entering(x, "weight", "bias")
    return _LayerNorm.apply(x, module.weight, module.bias, site, list(module.normalized_shape), module.eps)  # type: ignore


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: Any, site: Site, shape: list[int], eps: float):
        ctx.site, ctx.shape, ctx.input_dtype = site, shape, x.dtype
        out_dtype = torch.float32 if autocast_dtype(x) is not None and x.is_cuda else x.dtype
        x = x.to(weight.dtype)
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return out.to(out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        g = ctx.site.state.isolate(grads[0]).to(x.dtype)
        has_weight, has_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]

        def pieces(rows: Rows) -> dict[str, Piece]:

            def per_unit(values: torch.Tensor) -> Piece:
                values = ctx.site.fold(values, rows.num_rows)
                return Instantiated(rows.add_up(values.reshape(rows.num_rows, -1, *ctx.shape).sum(1)))

            found: dict[str, Piece] = {}
            if has_weight:
                found["weight"] = per_unit(wide(g) * (wide(x) - mean) * rstd)
            if has_bias:
                found["bias"] = per_unit(wide(g))
            return found

        plain = ctx.site.receive(g, pieces)
        backward = torch.ops.aten.native_layer_norm_backward
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            grad_x = backward(g, x, ctx.shape, mean, rstd, weight, bias, mask)[0].to(ctx.input_dtype)
        if plain:
            g_, x_ = plain_inputs(ctx.site, g, x)
            mask = [False, has_weight, has_bias]
            mean, rstd = mean.nan_to_num(0, 0, 0), rstd.nan_to_num(0, 0, 0)
            _, grad_weight, grad_bias = backward(g_, x_, ctx.shape, mean, rstd, weight, bias, mask)
        return grad_x, grad_weight, grad_bias, None, None, None

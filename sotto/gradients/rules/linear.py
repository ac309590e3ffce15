"""`y = x W^T + b` (nn.Linear) and `y = x W + b` (transformers' Conv1D of the GPT-2 family)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sotto.gradients.pieces import Factored, Instantiated, Piece, wide
from sotto.gradients.rows import Rows
from sotto.gradients.rules.contain import untapped
from sotto.gradients.taps import Site, autocast_dtype


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_written_out(module: nn.Module) -> bool:
    """A linear layer whose forward writes the product out, `x @ W.T + b`, where no functional call can be replaced."""
    return type(module).__name__ == "FalconLinear" and type(module).__module__.startswith("transformers.models.falcon.")


def tap(site: Site) -> Any:
    def forward(input: torch.Tensor) -> torch.Tensor:
        if not site.active():
            return untapped(site, input)
        return tapped_linear(site, input, False)

    return forward


def tap_conv1d(site: Site) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if not site.active():
            return untapped(site, x)
        return tapped_linear(site, x, True)

    return forward


def tapped_linear(site: Site, x: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Applies the layer of `site.module` to x (..., d), recording under the roles `weight` and `bias`."""
    module = site.module
    if not site.owns(module.weight, module.bias):
        site.decline("its weight is computed from other parameters")
        return untapped(site, x)
    site.entering(x, "weight", "bias")
    return _Linear.apply(x, module.weight, module.bias, site, transposed)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, site: Site, transposed: bool
    ):
        ctx.site, ctx.transposed, ctx.input_dtype = site, transposed, x.dtype
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        if (dtype := autocast_dtype(x)) is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        # Without a trainable weight (BiTFiT) the input is never needed again.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return not_a_view(F.linear(x, weight.T if transposed else weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        g = ctx.site.state.isolate(grads[0])
        x, weight = ctx.saved_tensors
        has_weight, has_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]

        def pieces(rows: Rows) -> dict[str, Piece]:
            found: dict[str, Piece] = {}
            g_BTp = ctx.site.fold(g, rows.num_rows)
            g_BTp = g_BTp.reshape(rows.num_rows, -1, g.shape[-1])
            if has_weight:
                found["weight"] = Factored(x.detach().reshape(*g_BTp.shape[:2], x.shape[-1]), g_BTp, ctx.transposed)
            if has_bias:
                found["bias"] = Instantiated(rows.add_up(wide(g_BTp).sum(1)))
            return found

        grad_weight = grad_bias = None
        if ctx.site.receive(g, pieces):
            g_, x_ = plain_inputs(ctx.site, g, x)
            flat_g = g_.reshape(-1, g_.shape[-1])
            if has_weight:
                flat_x = x_.reshape(-1, x_.shape[-1])
                grad_weight = (flat_x.T @ flat_g if ctx.transposed else flat_g.T @ flat_x).to(ctx.weight_dtype)
            if has_bias:
                grad_bias = flat_g.sum(0).to(ctx.bias_dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = F.linear(g, weight if ctx.transposed else weight.T).to(ctx.input_dtype)
        return grad_x, grad_weight, grad_bias, None, None


def not_a_view(out: torch.Tensor) -> torch.Tensor:
    """Models write into outputs (`out += residual`), which autograd forbids for views made in a custom function."""
    return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out


def plain_inputs(site: Site, g: torch.Tensor, x: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """Zeroes rows of non-finite units, so that their zero weight in the sum is zero and not nan."""
    bad_B = site.state.bad_B
    if bad_B is None:
        return g, x
    folded = site.fold(g, len(bad_B))
    if folded.shape[0] != len(bad_B):
        return g, x
    bad = bad_B.view(-1, *[1] * (folded.dim() - 1)).expand(*folded.shape[:-1], 1).reshape(*g.shape[:-1], 1)
    return g.masked_fill(bad, 0), None if x is None else x.masked_fill(bad, 0)

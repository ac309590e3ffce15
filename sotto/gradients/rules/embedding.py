"""Token, position and type embeddings."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from sotto.errors import SottoError
from sotto.gradients.pieces import Indexed, Piece
from sotto.gradients.rows import Rows
from sotto.gradients.rules.contain import untapped
from sotto.gradients.rules.linear import not_a_view, plain_inputs
from sotto.gradients.taps import Site


def refuse_unsupported(module: nn.Embedding) -> None:
    for option, value in (("max_norm", module.max_norm), ("scale_grad_by_freq", module.scale_grad_by_freq)):
        if value:
            raise SottoError(
                "SOT602", what=f"an embedding uses {option}", where=repr(module),
                why="it makes one example's gradient depend on the other examples of the batch",
                fix=f"build the embedding without {option}",
            )  # fmt: skip


def tap(site: Site) -> Any:
    def forward(input: torch.Tensor) -> torch.Tensor:
        if not site.active():
            return untapped(site, input)
        return tapped_embedding(site, input, site.module.padding_idx)

    return forward


def tapped_embedding(site: Site, ids: torch.Tensor, padding_idx: Any) -> torch.Tensor:
    """Looks ids up in `site.module`, recording under the role `weight`.

    Position ids of shape (1, T) are broadcast over the batch by nearly every model, which adds up the gradients of all
    examples before anyone can see them; here they are expanded to (B, T) first, if the model was given such a tensor.
    """
    state, weight = site.state, cast(torch.Tensor, site.module.weight)
    if ids.dim() < 2 or not site.owns(weight):
        site.decline("its ids have no batch dimension" if ids.dim() < 2 else "its weight is computed elsewhere")
        return F.embedding(ids, weight, padding_idx)
    current = state.inside or state.in_backward
    if current and ids.dim() == 2 and ids.shape[0] == 1 and (state.batch_size, ids.shape[1]) in state.input_shapes:
        ids = ids.expand(state.batch_size, -1)
    # A square (T, T) table of relative positions looks like a batch when T happens to be B.
    site.anchored = tuple(ids.shape) in state.input_shapes and ids.shape[0] != ids.shape[1]
    site.entering(ids, "weight")
    return _Embedding.apply(ids, weight, site, padding_idx)  # type: ignore[no-any-return]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, site: Site, padding_idx: int | None):
        ctx.site, ctx.rows, ctx.dtype = site, weight.shape[0], weight.dtype
        ctx.padding_idx = None if padding_idx is None else padding_idx % weight.shape[0]
        ctx.save_for_backward(ids)
        return not_a_view(F.embedding(ids, weight))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        g = ctx.site.state.isolate(grads[0])
        (ids,) = ctx.saved_tensors

        def pieces(rows: Rows) -> dict[str, Piece]:
            flat_ids = ids.reshape(ids.shape[0], -1)
            return {"weight": Indexed(flat_ids, g.reshape(*flat_ids.shape, -1), ctx.rows, ctx.padding_idx)}

        if not ctx.site.receive(g, pieces):
            return None, None, None, None
        g, _ = plain_inputs(ctx.site, g, None)
        padding = -1 if ctx.padding_idx is None else ctx.padding_idx
        grad_weight = torch.ops.aten.embedding_dense_backward(g, ids, ctx.rows, padding, False).to(ctx.dtype)
        return None, grad_weight, None, None

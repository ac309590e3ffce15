"""Which weights are worth perturbing, decided without data (after DP-ZOPO, Liu et al. 2024, arXiv:2402.07818).

The score of a weight is |w| times the derivative of the model's output with respect to it, for the model in which
every weight is replaced by its absolute value and which reads one token (SynFlow, Tanaka et al. 2020,
arXiv:2006.05467). The weights with the lowest scores are kept: those through which the least flows. (DP-ZOPO multiplies
by a curvature as well.) It is a function of the untrained, public weights, so it costs no privacy.

A matrix that begins at zero, as the last layer of a new classifier does, lets nothing through: all scores below it
would be zero, and its own as well. Nothing public says which of its entries matter: all are kept. It counts as ones.

Shape legend: d all trainable entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


def masks(model: nn.Module, parameters: Mapping[str, nn.Parameter], keep: float) -> dict[str, torch.Tensor]:
    """Name -> bool tensor, true for the `keep` part of all scored entries that have the lowest scores (at least one).

    Args:
      model: with its untrained weights; it is left as it is.
      parameters: the trainable parameters; entries of score zero, through which nothing flows, come last. All of a
        matrix of zeros are kept besides.
    """
    scores = {name: score.flatten() for name, score in _scores(model, parameters).items()}
    new = [name for name, p in parameters.items() if _is_new(p)]
    scored = {name: score for name, score in scores.items() if name not in new}
    all_d = torch.cat([torch.where(s > 0, s, torch.inf) for s in scored.values()]) if scored else torch.zeros(0)
    chosen_d = torch.zeros_like(all_d, dtype=torch.bool)
    chosen_d[all_d.argsort(stable=True)[: max(1, round(keep * len(all_d)))]] = True
    parts = dict(zip(scored, chosen_d.split([len(s) for s in scored.values()]), strict=True))
    return {
        name: (torch.ones(p.shape, dtype=torch.bool) if name in new else parts[name].view(p.shape))
        for name, p in parameters.items()
    }


def _is_new(weight: torch.Tensor) -> bool:
    return weight.dim() > 1 and not bool(weight.detach().any())


def _scores(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    positive = {
        name: (torch.ones_like(p) if _is_new(p) else p.detach().abs()).requires_grad_(name in parameters)
        for name, p in model.named_parameters()
        if p.is_floating_point()
    }
    token: Any = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    inputs = {"input_ids": token, "attention_mask": torch.ones_like(token)}
    with torch.enable_grad():
        out = functional_call(model, positive, (), inputs, tie_weights=True)
        total = out.logits.sum()
        wanted = [positive[name] for name in parameters]
        grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return {
        name: torch.zeros_like(w).cpu() if g is None else (w * g).detach().abs().float().cpu()
        for name, w, g in zip(parameters, wanted, grads, strict=True)
    }

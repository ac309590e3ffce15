"""Fills a side network with the largest rows and columns of the backbone's own weights. No data is looked at.

Whole attention heads and whole neurons are kept, and the same coordinates of the hidden states in all layers, so that
what is kept still fits together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sotto.errors import SottoError


@dataclass
class _Linear:
    """A linear layer of a block. `inner` is the space that it has besides the hidden states: heads or neurons."""

    path: str
    attention: bool
    leaves: bool
    """It leads from the inner space back to the hidden states, not from them into it."""

    def weight(self, block: nn.Module) -> torch.Tensor:
        """(out, in)"""
        module: Any = block.get_submodule(self.path)
        return module.weight.T if isinstance(module, Conv1D) else module.weight


@torch.no_grad()
def prune_into(side: Any, layers: nn.ModuleList, config: Any, small: Any) -> None:
    """Overwrites blocks and ladders of a new side network.

    Args:
      side: a `SideNetwork` whose blocks are of the layers' class.
      layers: the backbone's.
      config, small: of the backbone and of the side network's blocks.

    Raises:
      SottoError: SOT343, the layers have weights whose meaning is not known here, as those of a decoder with encoder.
    """
    if side.across is not None:
        raise _unknown("attention to the encoder")
    blocks = [layers[i] for i in side.kept]
    linears = [_linears(block) for block in blocks]
    size_d = sum(_hidden_importance(b, found) for b, found in zip(blocks, linears, strict=True))
    kept_s = _largest(size_d, small.hidden_size)  # type: ignore[arg-type]
    for block, found, new in zip(blocks, linears, side.blocks, strict=True):
        _fill(block, new, found, kept_s, config, small)
    for ladder in (side.entry, *side.ladders):
        ladder.weight.zero_()
        ladder.weight[torch.arange(len(kept_s)), kept_s] = 1.0


def _linears(block: nn.Module) -> list[_Linear]:
    """In every architecture the projection that ends attention, or the MLP, is registered last among its own."""
    paths = [n for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    attention = [p for p in paths if "attn" in p or "attention" in p]
    rest = [p for p in paths if p not in attention]
    fused = [p for p in attention if "query_key_value" in p or "qkv" in p]
    if len(attention) < 2 or len(rest) < 2 or fused:
        raise _unknown(fused[0] if fused else "its linear layers")
    return [_Linear(p, p in attention, p in (attention[-1], rest[-1])) for p in paths]


def _largest(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest values, in ascending order; of equal ones the first."""
    return torch.sort(torch.sort(importance, descending=True, stable=True).indices[:count]).values


def _hidden_importance(block: nn.Module, linears: list[_Linear]) -> torch.Tensor:
    """(d,) sum of squares of the weights that read or write each coordinate of the hidden states."""
    return sum(found.weight(block).square().sum(1 if found.leaves else 0) for found in linears)  # type: ignore[return-value]


def _inner(weight: torch.Tensor, leaves: bool) -> torch.Tensor:
    return weight.square().sum(0 if leaves else 1)


def _kept_inner(block: nn.Module, linears: list[_Linear], config: Any, small: Any) -> dict[tuple[bool, int], Any]:
    """Kept coordinates of the inner spaces, by (attention, size of the space)."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    size_g = torch.zeros(groups)
    for found in (x for x in linears if x.attention):
        size = _inner(found.weight(block), found.leaves)
        if len(size) % (groups * width):
            raise _unknown(found.path)
        for part in size.split(_part(len(size), config)):
            size_g += part.view(groups, -1).sum(1)
    kept_groups = _largest(size_g, getattr(small, "num_key_value_heads", None) or small.num_attention_heads)
    kept: dict[tuple[bool, int], Any] = {}
    for size in {heads * width, groups * width}:
        kept[True, size] = torch.arange(size).view(groups, -1)[kept_groups].flatten()
    mlp = [x for x in linears if not x.attention]
    neurons = mlp[-1].weight(block).shape[1]
    if any(len(_inner(x.weight(block), x.leaves)) != neurons for x in mlp):
        raise _unknown("its MLP")
    importance = torch.stack([_inner(x.weight(block), x.leaves) for x in mlp]).sum(0)
    share = small.num_attention_heads / heads
    kept[False, neurons] = _largest(importance, max(1, round(neurons * share)))
    return kept


def _part(size: int, config: Any) -> int:
    """GPT-2 computes queries, keys and values in one layer, one after another."""
    heads = config.num_attention_heads
    full = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return full if size > full else size


def _fill(block: nn.Module, new: nn.Module, linears: list[_Linear], kept_s: Any, config: Any, small: Any) -> None:
    kept = _kept_inner(block, linears, config, small)
    filled = set()
    for found in linears:
        weight, target = found.weight(block), found.weight(new)
        size = weight.shape[1] if found.leaves else weight.shape[0]
        part = _part(size, config) if found.attention else size
        inner = torch.cat([kept[found.attention, part] + start for start in range(0, size, part)])
        rows, columns = (kept_s, inner) if found.leaves else (inner, kept_s)
        if target.shape != (len(rows), len(columns)):
            raise _unknown(found.path)
        target.copy_(weight[rows][:, columns])
        bias, target_bias = (getattr(b.get_submodule(found.path), "bias", None) for b in (block, new))
        if bias is not None:
            target_bias.copy_(bias[rows])  # type: ignore[union-attr]
        filled |= {f"{found.path}.weight", f"{found.path}.bias"}
    for name, value in new.named_parameters():
        if name in filled:
            continue
        source = block.get_parameter(name)
        if source.shape == value.shape:  # norms of single heads
            value.copy_(source)
        elif source.shape == (config.hidden_size,):
            value.copy_(source[kept_s])
        else:
            raise _unknown(name)


def _unknown(path: str) -> SottoError:
    return SottoError(
        "SOT343",
        what=f"The layers cannot be pruned: what the weights of {path} stand for is not known.",
        where="the side network's initialisation: prune",
        why="Rows and columns must be kept together with those that they are multiplied with.",
        fix="Initialise at random (init: random).",
    )

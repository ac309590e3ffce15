"""How the weights of frozen linear layers are kept: in bfloat16, or as whole numbers of 8 or 4 bits with their scales.

What is trained then stands beside such layers, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314), and stays float32.
The rounded weights *are* the model: the layer computes with exactly the numbers that `weight` gives, whatever else is
in the batch, and its backward pass takes the gradient of that product with respect to the input. So per-unit gradients
are as exact as before. Weights are rounded from the pretrained ones alone; no data is looked at.

Rounding is symmetric: `int8` with one scale for each output, `int4` with one for every 64 inputs of an output, two
numbers in a byte. Not covered: embeddings, output layers, heads and experts, which stay as they were loaded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from sotto.models import support
from sotto.models.wrapped import Wrapped

KINDS = ("float32", "bfloat16", "int8", "int4")
GROUP = 64
"""Inputs that share a scale in `int4`."""


class FrozenLinear(nn.Module):
    """Stands in for a linear layer that is not trained.

    Its entry in a state dict is that of the layer it stands for, with the rounded weight in float32.

    Shape legend: p outputs, d inputs, G groups of inputs, c codes of a group.
    """

    def __init__(self, layer: nn.Module, kind: str):
        super().__init__()
        self.kind, self.transposed = kind, isinstance(layer, Conv1D)
        weight: Any = layer.weight
        weight_pd = weight.detach().T if self.transposed else weight.detach()
        self.out_features, self.in_features = weight_pd.shape
        codes, scale = _rounded(weight_pd.float(), kind)
        # Parameters, so that whatever counts, moves or digests a model's frozen weights sees them.
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
        self.train(layer.training)

    @property
    def weight(self) -> torch.Tensor:
        """The numbers that the layer computes with, in the shape of the layer it stands for; made anew each time."""
        weight_pd = self.unpacked(torch.float32)
        return weight_pd.T if self.transposed else weight_pd

    @torch.no_grad()
    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """(p, d) the weight in a floating-point type."""
        if self.scale is None:
            return self.codes.to(dtype)
        if self.kind == "int8":
            return (self.codes * self.scale).to(dtype)
        codes_pGc = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(2)
        weight_pd = ((codes_pGc.to(self.scale.dtype) - 8) * self.scale).flatten(1)
        return weight_pd[:, : self.in_features].to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


class _Product(torch.autograd.Function):
    """x W^T + b. The weight is unpacked once more on the way back, so that no float copy of it waits there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype.itemsize < 8 else x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        out = F.linear(x.to(dtype), layer.unpacked(dtype), bias)
        # Models write into outputs, which autograd forbids for views made in a custom function.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        g = grads[0]
        return (g @ ctx.layer.unpacked(g.dtype)).to(ctx.dtype), None


@torch.no_grad()
def _rounded(weight_pd: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The codes of a weight, and what they are to be multiplied by."""
    tiny = torch.finfo(torch.float32).tiny
    if kind == "bfloat16":
        return weight_pd.to(torch.bfloat16), None
    if kind == "int8":
        scale_p1 = (weight_pd.abs().amax(1, keepdim=True) / 127).clamp_min(tiny)
        return (weight_pd / scale_p1).round().clamp(-127, 127).to(torch.int8), scale_p1
    padded_pGc = F.pad(weight_pd, (0, -weight_pd.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale_pG1 = (padded_pGc.abs().amax(2, keepdim=True) / 7).clamp_min(tiny)
    codes_pGc = ((padded_pGc / scale_pG1).round().clamp(-7, 7) + 8).to(torch.uint8)
    return codes_pGc[..., ::2] | (codes_pGc[..., 1::2] << 4), scale_pG1


def store(model: nn.Module, kind: str) -> int:
    """Rounds the weights of a prepared model's frozen linear layers, one layer after the other, in place.

    Args:
      model: as `trainable.prepare` gives it; what is trained is not touched.
      kind: `bfloat16`, `int8` or `int4`; `float32` changes nothing.

    Returns:
      how many layers were changed.
    """
    if kind == "float32":
        return 0
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    chosen = [path for path, module in model.named_modules() if _fits(model, path, module, uses)]
    for path in chosen:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, FrozenLinear(owner.get_submodule(name), kind))
    return len(chosen)


def _fits(model: nn.Module, path: str, module: nn.Module, uses: dict[int, int]) -> bool:
    own = list(module.parameters(recurse=False))
    if type(module) not in (nn.Linear, Conv1D) or any(p.requires_grad or uses[id(p)] > 1 for p in own):
        return False
    # peft's factors may be frozen (FFA-LoRA), and it keeps a spare copy of a trained head.
    parts = path.split(".")
    beside = any(part.startswith("lora_") or part == "original_module" for part in parts)
    return not beside and "forward" not in module.__dict__ and not _is_end(model, parts, module)


def _is_end(model: nn.Module, parts: list[str], module: nn.Module) -> bool:
    """Whether a layer is an output embedding, or belongs to a classifier's head."""
    inner: Any = model.backbone if isinstance(model, Wrapped) else model
    inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    heads = support.head_names(inner)
    return module is getattr(inner, "get_output_embeddings", lambda: None)() or any(part in heads for part in parts)


def kind_of(model: nn.Module) -> str:
    """How a model's frozen linear layers are kept."""
    return next((m.kind for m in model.modules() if isinstance(m, FrozenLinear)), "float32")

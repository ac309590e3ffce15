"""The trained weights as one vector, in an order that server and clients share, and the fingerprint of all weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the trained tensors, in order. Their elements, one after another, are the n of an update."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, parameters: Mapping[str, torch.Tensor]) -> Layout:
        return cls(tuple((name, tuple(p.shape)) for name, p in parameters.items()))

    @property
    def size(self) -> int:
        return sum(torch.Size(shape).numel() for _, shape in self.shapes)

    def flat(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(n,) float32."""
        return torch.cat([tensors[name].detach().reshape(-1).float() for name, _ in self.shapes])

    def split(self, vector_n: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> tensor, views of the vector."""
        parts = vector_n.split([torch.Size(shape).numel() for _, shape in self.shapes])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes, parts, strict=True)}


def model_fingerprint(model: nn.Module) -> str:
    """64 hex digits over the name, type, shape and bytes of every frozen weight, and of the trained ones all but bytes.

    What is frozen must be the same on both sides; what is trained is sent with every round.
    """
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        head = [name, str(p.dtype), list(p.shape), p.requires_grad]
        digest.update(json.dumps(head).encode())
        if not p.requires_grad:
            digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for name, buffer in model.named_buffers():
        digest.update(json.dumps([name, str(buffer.dtype), list(buffer.shape)]).encode())
    return digest.hexdigest()

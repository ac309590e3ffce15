"""What a user's update becomes before it is sent: a linear map to fewer numbers, and back.

A codec is a function of public things alone: a public seed, public text, or releases that were noised before. So
nothing about it enters the guarantee: the bound and the noise are put on what it gives, in the latent space, and
decoding is post-processing (DR-Encoder, Wu et al. 2025, AAAI 39, in the order encode, clip, noise; a network trained
on white Gaussian gradients keeps no more of an update than a random projection of the same size, so that is what the
random prior is here).

All maps here are linear, Dec(mean of latents) = mean of Dec(latents), so they also work under secure aggregation.

Shape legend: n elements of an update, k of a latent, b of a block, p blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

BLOCK = 1 << 16


class Codec(Protocol):
    """Encodes (n,) updates as (k,) latents."""

    @property
    def size(self) -> int:
        """k."""
        ...

    def encode(self, update_n: torch.Tensor, step: int) -> torch.Tensor:
        """(k,) float32. The norm is not bounded here: clipping follows, and bounds what is sent whatever it is."""
        ...

    def decode(self, latent_k: torch.Tensor, step: int) -> torch.Tensor:
        """(n,) float32: an update, from a mean of latents of the same step."""
        ...

    def spec(self) -> dict[str, Any]:
        """What kind of map it is, and of which size; JSON. What it depends on beside that is its `state`."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Public tensors that the map depends on: sent with every order, and kept in checkpoints. Often none."""
        ...

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes what `state` gave. Raises SOT935 for anything else."""
        ...

    def learn(self, update_n: torch.Tensor) -> None:
        """Takes note of a decoded release, for later rounds."""
        ...


class Stateless:
    """A codec that depends on nothing but its `spec`, and learns nothing."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None: ...

    def learn(self, update_n: torch.Tensor) -> None: ...


class Identity(Stateless):
    """No codec: every element is sent."""

    def __init__(self, size: int):
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def encode(self, update_n: torch.Tensor, step: int) -> torch.Tensor:
        return update_n.float()

    def decode(self, latent_k: torch.Tensor, step: int) -> torch.Tensor:
        return latent_k.float()

    def spec(self) -> dict[str, Any]:
        return {"codec": "none", "size": self._size}


class Srht(Stateless):
    """A random projection with orthonormal rows, new in every round: signs, Hadamard transform, a choice of rows.

    P = S H D, applied to p interleaved blocks of a power of two of elements (Ailon and Chazelle 2009; Tropp 2011,
    arXiv:1011.1595). With N = p b, `encode` gives sqrt(N / k) P u and `decode` sqrt(N / k) P^T z, so that a decoded
    update is right on average and a latent has the norm of its update on average: clip norms and learning rates keep
    their meaning. Of the direction of an update a latent keeps cosine sqrt(k / N). Time O(n log b), no matrix is
    stored.
    """

    def __init__(self, size: int, latent: int, key: str):
        """Sets up the map.

        Args:
          size: n.
          latent: k, at most n.
          key: the public key of the run's projections.
        """
        self._n, self._k, self.key = size, latent, key
        self._block = min(BLOCK, 1 << max(0, (size - 1).bit_length()))
        self._blocks = math.ceil(size / self._block)
        self._scale = math.sqrt(self._blocks * self._block / latent)

    @property
    def size(self) -> int:
        return self._k

    def encode(self, update_n: torch.Tensor, step: int) -> torch.Tensor:
        signs_N, chosen_k = self._draw(step)
        padded = torch.zeros(self._blocks * self._block)
        padded[: self._n] = update_n.float().cpu()
        mixed_pb = hadamard((padded * signs_N).view(self._block, self._blocks).T.contiguous())
        return mixed_pb.reshape(-1)[chosen_k] * self._scale

    def decode(self, latent_k: torch.Tensor, step: int) -> torch.Tensor:
        signs_N, chosen_k = self._draw(step)
        mixed = torch.zeros(self._blocks * self._block)
        mixed[chosen_k] = latent_k.float().cpu() * self._scale
        spread_pb = hadamard(mixed.view(self._blocks, self._block))
        return (spread_pb.T.reshape(-1) * signs_N)[: self._n]

    def _draw(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(p * b,) signs and (k,) rows of one round, from the public key."""
        seed = hashlib.sha256(f"srht/{self.key}/{step}".encode()).digest()
        stream = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))
        total = self._blocks * self._block
        bits = np.unpackbits(np.frombuffer(stream.bytes(math.ceil(total / 8)), dtype=np.uint8))[:total]
        rows = stream.choice(total, self._k, replace=False, shuffle=False)
        return torch.from_numpy(bits.astype(np.float32)) * 2 - 1, torch.from_numpy(np.sort(rows))

    def spec(self) -> dict[str, Any]:
        return {"codec": "srht", "size": self._n, "latent": self._k, "block": self._block, "key": self.key}


def hadamard(rows_pb: torch.Tensor) -> torch.Tensor:
    """(p, b) rows times the orthonormal Hadamard matrix of Sylvester's order; b is a power of two."""
    blocks, size = rows_pb.shape
    out, half = rows_pb, 1
    while half < size:
        pairs = out.view(blocks, -1, 2, half)
        out = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).view(blocks, size)
        half *= 2
    return out / math.sqrt(size)


def cosine(a_n: torch.Tensor, b_n: torch.Tensor) -> float:
    """Of the angle between two updates; 0 where one of them is zero."""
    norms = float(a_n.double().norm() * b_n.double().norm())
    return float(a_n.double() @ b_n.double()) / norms if norms else 0.0

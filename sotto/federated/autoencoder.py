"""The autoencoder of DR-Encoder's first stage, to compare with, and what it keeps of an update.

In the paper (Wu et al. 2025, AAAI 39, section on random prior pre-training, as far as it is public) a server trains an
autoencoder on synthetic gradients, independent normal numbers, so that it has never seen a real one. Independent
numbers have no structure to learn: no map to k of n numbers and back can keep more than k / n of their energy, and what
such a network keeps of a real update is about that of a random projection. It is measured when it is built, and said.

Blocks of 256 elements are encoded each by the same network, 256 - 128 - j - 128 - 256 with tanh.

Shape legend: n elements of an update, p blocks of b elements, j of a block's latent, k = p j of a latent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

BLOCK, HIDDEN, STEPS, ROWS = 256, 128, 1500, 256


class Autoencoder:
    """A codec that is not linear: a mean of latents is decoded, not latents one by one.

    Attributes:
      kept: the part of the energy of random numbers like those it was trained on that it gives back.
    """

    def __init__(self, size: int, latent: int, key: str, norm: float):
        """Trains the network on independent normal numbers from a public key: some seconds.

        Args:
          size: n.
          latent: the most numbers that it may give; k is the largest multiple of the blocks below it.
          key: the run's public key.
          norm: what an update's norm is taken to be, so that its elements have about the size that the network knows:
            the clip norm, which is public.
        """
        self._n, self._key = size, key
        self._unit = norm / math.sqrt(size)
        self._blocks = math.ceil(size / BLOCK)
        self._each = max(1, latent // self._blocks)
        seed = int.from_bytes(hashlib.sha256(f"autoencoder/{key}".encode()).digest()[:8], "little")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._encoder = nn.Sequential(nn.Linear(BLOCK, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, self._each))
            self._decoder = nn.Sequential(nn.Linear(self._each, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, BLOCK))
            self.kept = self._train()

    def _train(self) -> float:
        parameters = [*self._encoder.parameters(), *self._decoder.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        for _ in range(STEPS):
            x_pb = torch.randn(ROWS, BLOCK)
            loss = (self._decoder(self._encoder(x_pb)) - x_pb).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            x_pb = torch.randn(16 * ROWS, BLOCK)
            missing = (self._decoder(self._encoder(x_pb)) - x_pb).square().sum() / x_pb.square().sum()
        return 1 - float(missing)

    @property
    def size(self) -> int:
        return self._blocks * self._each

    @torch.no_grad()
    def encode(self, update_n: torch.Tensor, step: int) -> torch.Tensor:
        padded = torch.zeros(self._blocks * BLOCK)
        padded[: self._n] = update_n.float().cpu() / self._unit
        return self._encoder(padded.view(self._blocks, BLOCK)).reshape(-1) * self._unit

    @torch.no_grad()
    def decode(self, latent_k: torch.Tensor, step: int) -> torch.Tensor:
        given_pb = self._decoder(latent_k.float().cpu().view(self._blocks, self._each) / self._unit)
        return given_pb.reshape(-1)[: self._n] * self._unit

    def spec(self) -> dict[str, Any]:
        return {"codec": "autoencoder", "size": self._n, "latent": self.size, "key": self._key, "unit": self._unit}

    def state(self) -> dict[str, torch.Tensor]:
        """Its weights, so that server and devices have the same to the last bit."""
        named = {"encoder": self._encoder, "decoder": self._decoder}
        return {f"{part}.{n}": p.detach() for part, net in named.items() for n, p in net.named_parameters()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        for part, network in (("encoder", self._encoder), ("decoder", self._decoder)):
            network.load_state_dict({n.partition(".")[2]: t for n, t in state.items() if n.startswith(part + ".")})

    def learn(self, update_n: torch.Tensor) -> None:
        """Nothing: trained on releases it would no longer be the paper's."""

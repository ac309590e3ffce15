"""What a user's device computes in a round: a bounded, encoded change of the trained weights, from its own text.

Sensitivity: the vector that leaves has at most the norm that the order names, whatever the text, the weights and the
codec are; a vector that is not finite leaves as zeros. Neighbouring relation and event are those of the round
(`cohort`): the sum over users of such vectors, with noise of the server's, on a Poisson sample of users.

Nothing else leaves: no loss, no count of examples, no norm (`specs` of the message are in `wire`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto import dropout
from sotto.config import Config
from sotto.config_federated import FederatedSetting
from sotto.data import LoadedData, microbatches
from sotto.federated.codec import Codec
from sotto.federated.embedding_rows import EmbeddingRows
from sotto.federated.layout import Layout
from sotto.federated.shares import Shares
from sotto.losses import autocast, forward_losses, to_device
from sotto.privacy.noise import NoiseSource
from sotto.zeroth_order.engine import ZerothOrder
from sotto.zeroth_order.release import NAME

Computes = Callable[["Order", np.ndarray, int], torch.Tensor]
"""(order, a user's examples, its number in the register) -> its update, before encoding."""


@dataclass(frozen=True)
class Order:
    """What a server asks of one user in one round. All of it is public.

    Attributes:
      step: the round, from 0.
      clip_norm: bound on the norm of what is sent.
      weights: name -> trained tensor as it is now.
      run: the name of the run at the server.
    """

    step: int
    clip_norm: float
    weights: Mapping[str, torch.Tensor]
    run: str = ""


class LocalTraining:
    """A few epochs of plain SGD or AdamW on one user's examples; the update is start minus end.

    The order of examples is a public function of round and data, and the optimizer starts afresh in every round, so a
    device keeps nothing between rounds.
    """

    def __init__(
        self,
        config: Config,
        setting: FederatedSetting,
        model: nn.Module,
        data: LoadedData,
        pad: int,
        codec: Codec | None = None,
    ):
        self.config, self.setting, self.model, self.data, self._pad = config, setting, model, data, pad
        self._rows = codec if isinstance(codec, EmbeddingRows) else None
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.layout = Layout.of(self.parameters)
        self._device = next(model.parameters()).device

    def __call__(self, order: Order, examples: np.ndarray, number: int = 0) -> torch.Tensor:
        """(n,) float32 start minus end; the same whatever the user's number is."""
        self._take(order.weights)
        if len(examples) == 0:
            return torch.zeros(self.layout.size)
        self.model.train(self.config.method.dropout)
        optimizer = self._optimizer()
        with dropout.masks(self.config, self._device, order.step, "local"):
            for epoch in range(self.setting.local_epochs):
                for rows in self._batches(order.step, epoch, examples):
                    self._descend(optimizer, rows, order.step)
        end = self.layout.flat(self.parameters)
        self._take(order.weights)
        return self.layout.flat(self.parameters).sub_(end).cpu()

    def _take(self, weights: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])

    def _optimizer(self) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if self.setting.local_optimizer == "adamw" else torch.optim.SGD
        return kind(list(self.parameters.values()), lr=self.setting.local_learning_rate, weight_decay=0.0)

    def _batches(self, step: int, epoch: int, examples: np.ndarray) -> list[np.ndarray]:
        seed = hashlib.sha256(f"local/{self.config.run.seed}/{step}/{epoch}".encode()).digest()
        shuffled = np.random.default_rng(int.from_bytes(seed, "little")).permutation(examples)
        size = self.setting.local_batch_size
        return [shuffled[start : start + size] for start in range(0, len(shuffled), size)]

    def _descend(self, optimizer: torch.optim.Optimizer, rows: np.ndarray, step: int) -> None:
        """One local step on the mean loss of a few examples."""
        optimizer.zero_grad(set_to_none=True)
        most = self.config.run.microbatch_size
        lengths, size = self.data.examples.lengths, len(rows) if most == "auto" else most
        for some in microbatches(rows, np.arange(len(rows)), lengths, size):
            batch = to_device(self.data.examples.collate(rows[some], self._pad), self._device)
            with autocast(self.config, self._device):
                losses_B = forward_losses(self.model, batch, self.config.data.task)
            (losses_B.sum() / len(rows)).backward()
        if self._rows is not None:
            self._rows.freeze_others(self.parameters, step)
        if self.setting.local_clip_norm is not None:
            nn.utils.clip_grad_norm_(list(self.parameters.values()), self.setting.local_clip_norm)
        optimizer.step()


class Probing:
    """Losses along the run's public directions: K numbers leave, and no codec is needed.

    Where the trained tensors are split (`setting.parts`; Spry, Panchal et al. 2024), a user looks at one part, and its
    numbers for the others are 0. Which one is public, and depends on nobody else: so a user more or less changes the
    sum by its own K numbers, and the sensitivity is the bound on them, whatever the number of parts is.
    """

    def __init__(self, engine: ZerothOrder, data: LoadedData, pad: int):
        self.engine, self.data, self._pad = engine, data, pad
        self._device = next(iter(engine.parameters.values())).device

    def __call__(self, order: Order, examples: np.ndarray, number: int) -> torch.Tensor:
        """(parts * K,) what `zeroth_order` gives for this user, not clipped yet."""
        with torch.no_grad():
            for name, parameter in self.engine.parameters.items():
                parameter.copy_(order.weights[name])
        if len(examples) == 0:
            return self.engine.zeros().gradients[NAME]
        batch: dict[str, Any] = to_device(self.data.examples.collate(examples, self._pad), self._device)
        units_B = torch.zeros(len(examples), dtype=torch.long, device=self._device)
        part = self.engine.directions.part_for(order.step, number)
        return self.engine.clipped_sum(batch, units_B, order.step, part).gradients[NAME].cpu()


class Client:
    """One device with the text of one or more users. Answers orders, one user at a time."""

    def __init__(
        self,
        compute: Computes,
        codec: Codec,
        data: LoadedData,
        shares: Shares | None = None,
        noise: NoiseSource | None = None,
    ):
        """Sets up the device.

        Args:
          compute: what it computes for a user.
          codec: encodes it.
          data: its users' text.
          shares, noise: where users add the noise: how much, and where it comes from.
        """
        self._compute, self.codec, self.data, self.shares, self._noise = compute, codec, data, shares, noise

    def answer(self, order: Order, user: int, number: int | None = None) -> torch.Tensor:
        """What leaves the device: (k,) float32 of norm at most `order.clip_norm`, or int32 with a share of the noise.

        Args:
          user: an index of `data.units`; one that it does not have gives zeros.
          number: of this user in the register; default: the same.
        """
        known = user < len(self.data.units)
        examples = self.data.units.members_of(np.array([user]))[0] if known else np.zeros(0, dtype=np.int64)
        number = user if number is None else number
        update_n = self._compute(order, examples, number)
        vector_k = bounded(self.codec.encode(update_n, order.step), order.clip_norm)
        if self.shares is None:
            return vector_k
        assert self._noise is not None
        return self.shares.message(vector_k, self._noise, order.step, f"share of {number}")


def bounded(vector_k: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """(k,) float32 scaled down to the norm `clip_norm`, never up; zeros where it is not finite.

    The norm is taken in float64 of the float32 values that are sent, and the factor leaves room for their rounding: the
    norm of the result is at most clip_norm, not only nearly.
    """
    vector_k = vector_k.detach().to(torch.float32)
    norm = float(torch.linalg.vector_norm(vector_k, dtype=torch.float64))
    if not np.isfinite(norm):
        return torch.zeros_like(vector_k)
    if norm <= clip_norm:
        return vector_k
    scaled = (vector_k.double() * (clip_norm / norm * (1 - 2.0**-23))).float()
    return scaled if float(scaled.double().norm()) <= clip_norm else torch.zeros_like(vector_k)

"""A site with many units: its part of a step of central training, computed where the text is.

In a round every site draws its own units, each with the plan's probability and from a generator that nobody else knows,
sums their clipped gradients with the engine of central training, and sends the sum, with its share of the noise where
`noise: clients`. The union of the sites' draws is a Poisson sample of all units, and the sum of their sums is that of
central training; so the plan, its sensitivity and its event are those of central training. A unit must stand at one
site only.

What the server checks is that a site's sum is no longer than all of its units together could make it: a site that lies
can spoil the model, but not the guarantee of units at other sites.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto import dropout
from sotto.config import Config
from sotto.data import LoadedData, PoissonSampler, Units
from sotto.federated.cohort import Cohort
from sotto.federated.layout import Layout
from sotto.federated.shares import Shares
from sotto.gradients.engine import Engine
from sotto.models.activation_cache import ActivationCache
from sotto.privacy.noise import NoiseSource
from sotto.zeroth_order.engine import ZerothOrder
from sotto.zeroth_order.release import NAME


@dataclass
class Site:
    """One site. It has what `training.clipped_sum` asks of whoever holds text."""

    config: Config
    model: nn.Module
    tokenizer: Any
    engine: Engine | ZerothOrder | Cohort
    data: LoadedData
    device: torch.device
    microbatch_size: int
    sampling_prob: float
    shares: Shares | None
    noise: NoiseSource
    activations: ActivationCache | None = None
    planted: Any = None
    checked: bool = False

    def answer(self, order: Any, number: int) -> torch.Tensor:
        """(n,) float32, the sum over the units that were drawn of their clipped gradients; int32 with a share of noise.

        Args:
          order: a `client.Order`; its bound is that of one unit.
          number: of this site.
        """
        from sotto import training  # which knows of engines that ask others

        with torch.no_grad():
            for name, parameter in self.engine.parameters.items():
                parameter.copy_(order.weights[name])
        units = self._sampler(order.step, number).draw(order.step)
        if not self.checked and len(self.data.units):
            training.check_gradients_of(self, np.arange(min(training.CHECKED_UNITS, len(self.data.units))))
            self.checked = True
        with dropout.masks(self.config, self.device, order.step, number):
            total = training.clipped_sum(self, units, order.step)
        self.checked = self.engine.arrangement == self.engine.verified  # else some module has gone to another rule
        if isinstance(self.engine, ZerothOrder):
            vector = total.gradients[NAME].float()
        else:
            vector = Layout.of(self.engine.parameters).flat(total.gradients).cpu()
        if self.shares is None:
            return vector
        return self.shares.message(vector, self.noise, order.step, f"share of site {number}")

    def _sampler(self, step: int, number: int) -> PoissonSampler:
        """A fresh key for every draw: a round that is asked for twice draws other units the second time."""
        seed = self.config.run.debug_noise_seed
        key = secrets.token_bytes(16)
        if seed is not None:
            key = hashlib.blake2b(f"site {number} {seed}".encode(), digest_size=16).digest()
        return PoissonSampler(len(self.data.units), self.sampling_prob, key, debug=seed is not None)


class Sites:
    """All sites of a simulation: one model, which each of them uses in turn."""

    def __init__(self, sites: Sequence[Site]):
        self._sites = sites

    def answer(self, order: Any, number: int) -> torch.Tensor:
        return self._sites[number].answer(order, number)

    @classmethod
    def of(
        cls,
        config: Config,
        model: nn.Module,
        tokenizer: Any,
        data: LoadedData,
        key: str,
        shares: Shares | None,
        noise: NoiseSource,
        count: int,
    ) -> Sites:
        """Deals the units out in turn: site s has the units s, s + count, s + 2 count, ..."""
        whole = site_for(config, model, tokenizer, data, key, shares, noise)
        parts = [_part(data.units, np.arange(first, len(data.units), count)) for first in range(count)]
        return cls([Site(**{**whole.__dict__, "data": _with_units(data, units)}) for units in parts])


def site_for(
    config: Config,
    model: nn.Module,
    tokenizer: Any,
    data: LoadedData,
    key: str,
    shares: Shares | None,
    noise: NoiseSource,
) -> Site:
    """A site with all of this text."""
    from sotto import memory_budget, session

    device = next(model.parameters()).device
    size = memory_budget.microbatch_size(config, device)
    engine = session.make_engine(model, config, device, key)
    return Site(config, model, tokenizer, engine, data, device, size, config.sampling_prob, shares, noise)


def _part(units: Units, chosen: np.ndarray) -> Units:
    sizes = units.sizes[chosen]
    members, _ = units.members_of(chosen)
    return Units(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), members)


def _with_units(data: LoadedData, units: Units) -> LoadedData:
    return LoadedData(data.examples, units, data.report, data.fingerprint)

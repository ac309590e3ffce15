"""What the server accepts of a round: one bounded vector of each user it asked, whatever came back.

Sensitivity: every user's part in the sum has at most the norm `clipping.sensitivity`, because vectors are bounded here
again: a device that does not follow its order, or is not what it says it is, moves the sum by no more than one that
does. What is not a vector of the right kind and size, or is not finite, is a zero; so are silence and errors, and none
of them stops a round. Weights of users are 1 and the divisor is a public constant (`GaussianMechanism`), not the number
of answers: it must not matter to anyone else whether a user answered. Neighbouring relation: one user added to or
removed from the register. Event: Poisson-sampled Gaussian.

Answers are added as they come, so memory does not grow with the number of users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from sotto.federated.client import Order, bounded
from sotto.federated.codec import Codec
from sotto.federated.shares import Shares, as_message
from sotto.gradients.base import ClippedSum
from sotto.gradients.clipping import Clipping
from sotto.privacy.noise import NoiseSource
from sotto.zeroth_order.directions import Directions

if TYPE_CHECKING:  # which needs libraries of the extra `federated`
    from sotto.federated.unmasking import MaskedRound

LATENT = "latent"
"""The one tensor of a sum of encoded updates: (k,) float64."""

Carrier = Callable[[Order, np.ndarray], Iterable[tuple[int, Any]]]
"""Takes an order to users (indices) and yields (user, what came back), in any order, as answers come."""

AT_THE_BOUND = 1 - 1e-6
"""A vector of more than this part of the bound was cut by its device."""


@dataclass
class Heard:
    """What came back in a round, for the server's private metrics: counts and reasons, never values.

    Attributes:
      moved: bytes of vectors, keys and shares, by stage; what a network adds, and the weights, are not counted.
    """

    asked: int = 0
    answered: int = 0
    refused: dict[str, int] = field(default_factory=dict[str, int])
    moved: dict[str, int] = field(default_factory=dict[str, int])

    def refuse(self, why: str) -> None:
        self.refused[why] = self.refused.get(why, 0) + 1

    def count(self, what: str, answer: Any) -> None:
        size = answer.nbytes if isinstance(answer, np.ndarray | torch.Tensor) else 0
        self.moved[what] = self.moved.get(what, 0) + size


class Cohort:
    """The training loop's engine where the data is elsewhere: sums what users send.

    Attributes:
      parameters: name -> trained parameter, at the server.
      clipping: bounds each user's vector; flat or adaptive.
      codec: of what users send.
      reach: where sites answer: the most that an honest one can send. Users are bounded by `clipping`.
      shares, noise: where users add the noise: what their messages are, and where what is missing comes from.
      masked: whether the server learns the sum of the messages alone.
      directions: what K numbers mean, where users send losses along directions; else None.
      run: the name of the run, for devices that take part in several.
      heard: of the last round.
    """

    arrangement: ClassVar[Any] = None
    verified: ClassVar[Any] = None

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        clipping: Clipping,
        codec: Codec,
        carrier: Carrier,
        name: str = LATENT,
    ):
        """Sets up the engine.

        Args:
          parameters: what is sent with every order.
          clipping: `Flat` or `Adaptive`, of the whole vector.
          codec: of what users send; its size is k, the numbers that each sends.
          carrier: takes orders to users.
          name: of the sum's one tensor.
        """
        self.parameters, self.clipping, self.codec = dict(parameters), clipping, codec
        self.carrier, self.name, self.run = carrier, name, ""
        self.directions: Directions | None = None
        self.reach: float | None = None
        self.shares: Shares | None = None
        self.noise: NoiseSource | None = None
        self.masked = False
        self.heard = Heard()
        clipping.group_of([name])  # tells one whose bounds follow the norms that there is one group

    def zeros(self) -> ClippedSum:
        """The sum over no users at all."""
        sums = {self.name: torch.zeros(self.codec.size, dtype=torch.float64)}
        return ClippedSum(sums, torch.zeros(0, 1, dtype=torch.float64), self.clipping.sensitivity)

    def order(self, step: int) -> Order:
        return Order(step, self.clipping.sensitivity, {n: p.detach() for n, p in self.parameters.items()}, self.run)

    def collect(self, users: np.ndarray, step: int) -> ClippedSum:
        """Asks these users, and adds up what comes back.

        Args:
          users: (m,) indices that the sampler drew.
        """
        if not self.masked:
            return self.add_up(users, self.carrier(self.order(step), users) if len(users) else (), step)
        from sotto.federated.unmasking import play

        round = self.masked_round(users, step)
        play(round, lambda asked: self.carrier(self.order(step), np.array(asked)))
        return self.close(round, step)

    def masked_round(self, users: np.ndarray, step: int) -> MaskedRound:
        """Begins a round whose messages are masked."""
        from sotto.federated.unmasking import MaskedRound

        assert self.shares is not None
        self.heard = Heard(asked=len(users))
        return MaskedRound(f"{self.run}/{step}", users.tolist(), self.shares, self.codec.size)

    def close(self, round: MaskedRound, step: int) -> ClippedSum:
        """The sum of a masked round. One that was given up is as if nobody had answered: all noise is the server's."""
        total, found = self.zeros(), round.total
        answered = 0 if found is None else len(round.survivors)
        self.heard.answered, self.heard.moved = answered, round.moved
        for why, count in round.refused.items():
            self.heard.refused[why] = self.heard.refused.get(why, 0) + count
        if found is not None:
            total.gradients[self.name] += found
        return self._complete(total, step)

    def add_up(self, users: np.ndarray, answers: Iterable[tuple[int, Any]], step: int = 0) -> ClippedSum:
        """The sum over these users of their answers: bounded, counted once each, and nobody else's."""
        total, self.heard = self.zeros(), Heard(asked=len(users))
        waiting, norms = set(users.tolist()), list[float]()
        for user, answer in answers:
            if user not in waiting:
                self.heard.refuse("from nobody who was asked, or a second time")
                continue
            waiting.remove(user)
            self.heard.count("messages up", answer)
            norm = self._add(total.gradients[self.name], answer)
            if norm is not None:
                norms.append(norm)
                self.heard.answered += 1
        total.group_norms = torch.tensor(norms, dtype=torch.float64).view(-1, 1)
        return total if self.shares is None else self._complete(total, step)

    def _complete(self, total: ClippedSum, step: int) -> ClippedSum:
        """The sum of noised messages, in the units of an update, with the shares of those who are missing."""
        assert self.shares is not None
        assert self.noise is not None
        sum_k = total.gradients[self.name]
        sum_k += self.shares.missing(self.heard.answered, self.codec.size, self.noise, step)
        sum_k *= self.shares.unit
        total.group_norms = total.group_norms[:0]  # norms of noise, mostly
        return total

    def _add(self, sum_k: torch.Tensor, answer: Any) -> float | None:
        """Adds one answer in place; returns the norm that it says its update had, or None if it was refused."""
        if self.shares is not None:
            return self._add_noised(sum_k, answer, self.shares)
        vector_k, why = _vector(answer, self.codec.size)
        if vector_k is None:
            self.heard.refuse(why)
            return None
        most = self.clipping.sensitivity
        norm = float(torch.linalg.vector_norm(vector_k, dtype=torch.float64))
        if not np.isfinite(norm):
            self.heard.refuse("not finite")
            return None
        sum_k += bounded(vector_k, self.reach or most).double()
        return norm if norm < most * AT_THE_BOUND else max(norm, most / AT_THE_BOUND)

    def _add_noised(self, sum_k: torch.Tensor, answer: Any, shares: Shares) -> float | None:
        message_k = as_message(answer, self.codec.size)
        if message_k is None:
            self.heard.refuse("not a vector of whole numbers")
            return None
        norm = float(message_k.norm())
        if norm > shares.longest(self.codec.size):
            self.heard.refuse("longer than bound and noise together")
            return None
        sum_k += message_k
        return norm

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield

    def detach(self) -> None:
        """There is nothing to take away from the model."""


def _vector(answer: Any, size: int) -> tuple[torch.Tensor | None, str]:
    """(k,) float32, or None and why not."""
    if isinstance(answer, np.ndarray):
        if answer.dtype != np.float32:
            return None, "not float32"
        answer = torch.from_numpy(answer)
    if not isinstance(answer, torch.Tensor):
        return None, "not a vector"
    if answer.dtype not in (torch.float32, torch.float64):
        return None, "not float32"
    if answer.shape != (size,):
        return None, "another shape"
    return answer.detach(), ""

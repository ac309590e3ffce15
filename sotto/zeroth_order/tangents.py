"""Derivatives along directions from one forward pass: what differences of two losses tend to.

Inside `Tangents`, every torch function that is given one of the parameters gets a dual number in its place: the
parameter with its direction as tangent (forward-mode differentiation; forward gradients: Baydin et al. 2022,
arXiv:2202.08587; federated, with weights split over clients: Spry, Panchal et al. 2024, arXiv:2405.15551). So the
losses come with u_k . grad f_i, exactly and in the precision of the pass, and no backward pass is run. A pass holds
activations and their tangents, twice what `perturb` holds, and the direction of one tensor at a time.

Limits. A function of torch without a forward derivative is refused by name; attention runs by its plain formula, whose
scores need room for each pair of tokens.

Shape legend: B examples, n rows of a table, c its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from sotto.errors import SottoError
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.perturb import Perturbed, Side


class Tangents(Perturbed):
    """Context: the parameters of `directions` are read with the direction as tangent. It goes inside `derivatives`."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], directions: Directions, step: int, k: int):
        super().__init__(parameters, directions, step, [Side(k, 0.0)])

    def stream(self, name: str, side: Side) -> None:
        """A direction goes beside the weight and is not added to it."""
        return

    def moved(self, value: Any, side: Side) -> Any:
        name = self.names.get(id(value))
        if name is None:
            return value
        u = self.directions.tensor(name, self.step, side.k, value.device)
        return forward_ad.make_dual(value.detach(), u.to(value.dtype))

    def some_rows(self, value: torch.Tensor, rows: slice, side: Side) -> torch.Tensor:
        (start, stop, step), size = rows.indices(len(value)), math.prod(value.shape[1:])
        if step != 1:
            return self.moved(value, side)[rows]
        name, stop = self.names[id(value)], max(start, stop)
        u = self.directions.slice(name, self.step, side.k, start * size, stop * size, value.device)
        part = value.detach()[start:stop]
        return forward_ad.make_dual(part, u.view(part.shape).to(part.dtype))

    def moved_rows(self, name: str, table: torch.Tensor, rows_n: torch.Tensor, side: Side) -> torch.Tensor:
        u_nc = self.directions.rows(name, self.step, side.k, rows_n)
        return forward_ad.make_dual(table.detach()[rows_n], u_nc.to(table.dtype))

    def linear(self, side: Side, input: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
        return F.linear(self.moved(input, side), self.moved(weight, side), self.moved(bias, side))

    def _addmm(self, side: Side, bias: Any, x_nc: torch.Tensor, weight_cm: Any) -> torch.Tensor:
        return torch.addmm(self.moved(bias, side), x_nc, self.moved(weight_cm, side))


@contextmanager
def derivatives() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Context in which tangents are followed; yields what reads them: (B,) losses -> (B,) derivatives.

    Raises:
      SottoError: SOT657, something in the model has no forward derivative.
    """

    def read(losses_B: torch.Tensor) -> torch.Tensor:
        tangent = forward_ad.unpack_dual(losses_B).tangent
        return torch.zeros_like(losses_B) if tangent is None else tangent

    try:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            yield read
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "jvp" not in str(error):
            raise
        raise SottoError(
            "SOT657", what=str(error).splitlines()[0][:200], where="method.zeroth_smoothing: 0",
            why="the exact derivative follows every operation of the model by its forward derivative",
            fix="set method.zeroth_smoothing: 1e-3, which needs losses alone",
        ) from None  # fmt: skip

"""One use of a module that is run again: what went in, what came out, and its parameters' gradients row by row.

Shape legend: see rows.py; b some of the B rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from sotto.errors import SottoError
from sotto.gradients.pieces import HOARD, Instantiated, OfCall, Piece, owned
from sotto.gradients.rows import Rows
from sotto.gradients.taps import State

if TYPE_CHECKING:
    from sotto.gradients.rules.rerun import RerunSite

Layout = int | None
"""How a tensor's rows belong to the examples: None, not at all; 0, one row each; T, T rows each, one after another."""


TENSOR = object()
"""Stands for a tensor among flattened arguments."""


class Unfit(Exception):
    """This module cannot be run one unit at a time."""


def layout_of(x: torch.Tensor, state: State) -> Layout:
    """How the tensor looks as if its rows belonged to the examples. What it looks like is checked afterwards."""
    size = state.batch_size
    if id(x) in state.constants:
        return None
    if x.dim() > 0 and x.shape[0] == size:
        return 0
    for shape in state.input_shapes:
        if x.dim() > 0 and len(shape) == 2 and shape[0] == size and x.shape[0] == size * shape[1]:
            return shape[1]
    return None


def by_row(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(B*T, ...) -> (B, T, ...) where T rows belong to an example."""
    return x.unflatten(0, (-1, layout)) if layout else x


def take(x: torch.Tensor, layout: Layout, index: torch.Tensor) -> torch.Tensor:
    """The rows of some examples, as the module is used to see them."""
    if layout is None:
        return x
    return x.unflatten(0, (-1, layout))[index].flatten(0, 1) if layout else x[index]


@dataclass
class Call:
    """One use of a module: what went in, what came out, and later the gradient of that.

    Attributes:
      leaves: the flattened arguments; tensors are kept by autograd between the passes, and None here.
      layouts: of the arguments' tensors; `outs` and `out_layouts`: of the floating tensors that came out.
      at: their places among the flattened outputs.
      half: the dtype of autocast, or None.
    """

    site: RerunSite
    spec: Any
    leaves: list[Any]
    layouts: list[Layout]
    at: list[int]
    out_layouts: list[Layout]
    half: torch.dtype | None
    tensors: list[torch.Tensor] = field(default_factory=list)
    outs: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    _norms: dict[str, torch.Tensor] = field(default_factory=dict)
    _sums: dict[str, torch.Tensor] = field(default_factory=dict)
    _factor_U: torch.Tensor | None = None

    def again(self, index: torch.Tensor) -> list[torch.Tensor]:
        """What the module gives for some examples alone. (b, ...) each."""
        tensors, layouts = iter(self.tensors), iter(self.layouts)
        leaves = [take(next(tensors), next(layouts), index) if leaf is TENSOR else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        try:
            with torch.autocast(index.device.type, self.half, enabled=self.half is not None):
                found = pytree.tree_leaves(self.site.run_alone(args, kwargs))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise Unfit(f"it does not run on some of the examples: {str(error).splitlines()[0][:80]}") from error
        if len(found) <= max(self.at) or not all(isinstance(found[i], torch.Tensor) for i in self.at):
            raise Unfit("it returns something else for one example")
        return [by_row(found[i], layout) for i, layout in zip(self.at, self.out_layouts, strict=True)]

    def agrees(self, found: list[torch.Tensor], index: torch.Tensor) -> bool:
        """Whether some examples gave alone what they gave inside the batch, where that is finite."""
        for x, out, layout in zip(found, self.outs, self.out_layouts, strict=True):
            expected = by_row(out, layout)[index]
            if x.shape != expected.shape:
                return False
            finite = torch.isfinite(expected)
            error = torch.where(finite, x.detach() - expected, 0).double().norm()
            tolerance = 5e-2 if self.half is not None or x.dtype in (torch.bfloat16, torch.float16) else 1e-4
            if not bool(error <= tolerance * torch.where(finite, expected, 0).double().norm() + 1e-12):
                return False
        return True

    def gradients(self, index: torch.Tensor, factor_b: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """{name: gradient} of the sum over some examples, each times its factor.

        Raises:
          Unfit: they did not give what they gave inside the batch.
        """
        covered = {name: p for name, p in self.site.covered.items() if p.requires_grad}
        if len(index) == 0:
            return {}
        with torch.enable_grad():
            found = self.again(index)
        if not self.agrees(found, index):
            raise Unfit("an example gives something else when it is run again on its own")
        outs, against = [], []
        for x, grad, layout in zip(found, self.grads, self.out_layouts, strict=True):
            if x.requires_grad:
                g = by_row(grad, layout)[index]
                outs.append(x)
                against.append(g if factor_b is None else g * factor_b.to(g.dtype).view(-1, *[1] * (g.dim() - 1)))
        if not outs:
            return {}
        grads = torch.autograd.grad(outs, list(covered.values()), against, allow_unused=True)
        return owned(covered, grads)

    def recorded(self, index: torch.Tensor, factor_b: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """As `gradients`, in a pass whose graph is gone, so that there is no other way to go."""
        try:
            return self.gradients(index, factor_b)
        except Unfit as unfit:
            self.site.decline(str(unfit))
            raise SottoError(
                "SOT612", what=str(unfit), where=f"module '{self.site.path}'",
                why="its gradient for one unit would not be that of this batch; nothing was released",
                fix="compute the losses again and call backward again: the module takes the slow path from now on",
            ) from None  # fmt: skip

    def pieces(self, rows: Rows) -> dict[str, Piece]:
        names = [name for name in self.site.covered if self.site.name(name) is not None]
        numbers = sum(self.site.covered[name].numel() for name in names)
        kept = sum(x.numel() for x in (*self.tensors, *self.outs, *self.grads))
        if rows.num_units * numbers <= HOARD * kept:
            return {name: Instantiated(grad, ours=True) for name, grad in self.instantiate(rows, names).items()}
        return {name: OfCall(self, name) for name in names}

    def instantiate(self, rows: Rows, names: list[str]) -> dict[str, torch.Tensor]:
        total = {}
        for name in names:
            parameter = self.site.covered[name]
            total[name] = torch.zeros(rows.num_units, *parameter.shape, dtype=parameter.dtype, device=parameter.device)
        for unit in range(rows.num_units):
            for name, grad in self.recorded(rows.members(unit)).items():
                if name in total:
                    total[name][unit] = grad
        return total

    def squared_norms(self, name: str, rows: Rows) -> torch.Tensor:
        if not self._norms:
            zeros = torch.zeros(rows.num_units, dtype=torch.float64, device=rows.unit_of_B.device)
            self._norms = {each: zeros.clone() for each in self.site.covered}
            for unit in range(rows.num_units):
                for each, grad in self.recorded(rows.members(unit)).items():
                    self._norms[each][unit] = grad.double().square().sum()
        return self._norms[name]

    def weighted_sum(self, name: str, factor_U: torch.Tensor, rows: Rows, bad_U: torch.Tensor | None) -> torch.Tensor:
        """One pass for all covered parameters, if they have the same factors."""
        same = self._factor_U is not None and torch.equal(self._factor_U, factor_U)
        if not same or name not in self._sums:
            good = torch.ones_like(factor_U, dtype=torch.bool) if bad_U is None else ~bad_U
            index = torch.nonzero(good[rows.unit_of_B]).flatten()
            self._sums = self.recorded(index, factor_U[rows.unit_of_B[index]])
            self._factor_U = factor_U
        zeros = torch.zeros_like(self.site.covered[name])
        return self._sums.pop(name) if name in self._sums else zeros

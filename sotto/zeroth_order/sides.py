"""Several sides in one forward pass: the batch repeated once per side, and each repeat under its own weights.

The matrix products of one layer then run one after another, but everything else (attention, activations, output loss)
runs once for all sides; matrices that are small, such as adapters, and directions of low rank are batched too, and the
product with the unmoved matrix is shared. It needs S times the activations of one side.

Only operations with a rule here can do this. Any other one is refused by name; one side at a time always works.

Shape legend: S sides, R rows of one side, x anything, m and c outputs and inputs of a linear layer, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F

from sotto.errors import SottoError
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.perturb import Batch, Perturbed, Side, kind_of
from sotto.zeroth_order.prefix import lengths_of
from sotto.zeroth_order.reading import Function, name_of
from sotto.zeroth_order.selection import Selections
from sotto.zeroth_order.small import Group

SMALL, CPU_SMALL = 1 << 22, 1 << 18
"""Elements of all sides of a matrix together, up to which they are made at once and multiplied as a batch: on a GPU,
and on a CPU, where to bring more of them together takes longer than to begin with each."""

_ELEMENTWISE = frozenset(["mul", "__mul__", "__rmul__", "add", "__add__", "__radd__", "sub", "__sub__"])


class Sides(Perturbed):
    """As `Perturbed`, for a batch whose rows are repeated once per side: all of side 0, then all of side 1, ...

    Attributes:
      rows: R, the rows of one side.
      lengths: of what is split into sides: R, and where rows are laid one after another what they come to.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        directions: Directions,
        step: int,
        sides: Sequence[Side],
        batch: Batch,
        stored: Iterable[torch.Tensor] = (),
        small: Sequence[Group] = (),
    ):
        """Prepares a pass.

        Args:
          batch: of one side.
          stored: all parameters and buffers of the model.
          parameters, directions, step, sides, small: as for `Perturbed`.
        """
        super().__init__(parameters, directions, step, sides, small)
        self._selections = Selections(self.names, {id(x) for x in stored}, _selected)
        self.rows = max(len(x) for x in batch.values())
        self.lengths = lengths_of(batch)

    def __enter__(self) -> Self:
        super().__enter__()
        self._selections.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._selections.__exit__(None, None, None)
        super().__exit__()

    def replace(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function for all sides at once.

        Raises:
          SottoError: SOT653, there is no rule for this function.
        """
        name, first = name_of(func), args[0] if args else None
        if func is F.linear and self.name(first) is None:
            return _linear(self, *args, **kwargs)
        if name in ("embedding", "layer_norm", "rms_norm") and args and self.name(first) is None:
            return _each(self, lambda side, x: self.one_side(func, (x, *args[1:]), kwargs, side), args[0])
        if name == "addmm" and len(args) == 3 and not kwargs and self.name(args[1]) is None:
            bias, x, weight = args
            return _each(self, lambda s, part: torch.addmm(self.moved(bias, s), part, self.moved(weight, s)), x)
        if name in _ELEMENTWISE and len(args) == 2 and not kwargs:
            return _elementwise(self, func, *args)
        raise _no_rule(name)


def _no_rule(name: str) -> SottoError:
    return SottoError(
        "SOT653",
        what=f"several sides cannot be probed in one pass through {name or 'this operation'}",
        where=name,
        why="no rule says how this operation keeps the weights of the sides apart",
        fix="probe one side at a time (sides=1)",
    )


def _selected(name: str) -> SottoError:
    return SottoError(
        "SOT653",
        what=f"several sides cannot be probed in one pass: {name} gets rows that the model selected",
        where=name,
        why="rows belong to a side by their place, and a text's loss must not depend on what others select",
        fix="probe one side at a time (sides=1)",
    )


def _split(mode: Sides, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows of each side. A tensor with one row that all rows share (positions) is the same for every side.

    What is as long as nothing in the batch is refused. What has such a length by chance, as a table of positions may,
    is found when `probes.Prober.check` compares the sides; selected rows never come here (`selection`).
    """
    sides, rows = len(mode.sides), mode.rows
    if x.dim() == 0 or (x.shape[0] == 1 and sides * rows > 1):
        return (x.expand(rows, *x.shape[1:]) if x.dim() else x,) * sides
    length, rest = divmod(x.shape[0], sides)
    if rest or length not in mode.lengths:
        raise _no_rule(f"an input of shape {tuple(x.shape)}")
    return x.chunk(sides)


def _each(mode: Sides, function: Callable[[Any, torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.cat([function(side, part) for side, part in zip(mode.sides, _split(mode, x), strict=True)])


def _linear(mode: Sides, input: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
    name = mode.name(weight)
    parts = _split(mode, input)
    low_rank = name is not None and mode.directions.is_low_rank(name)
    if len(input) == len(mode.sides) * mode.rows:  # they lie one after another, and need no copy
        x_Sxc = input.reshape(len(mode.sides), -1, input.shape[-1])
    else:
        x_Sxc = torch.stack([x.reshape(-1, x.shape[-1]) for x in parts])
    small = SMALL if input.is_cuda else CPU_SMALL
    if name is not None and not low_rank and len(mode.sides) * weight.numel() > small:
        out_Sxm = _one_after_another(mode, x_Sxc, weight, bias)
        return out_Sxm.view(-1, *parts[0].shape[1:-1], out_Sxm.shape[-1])
    if name is None or low_rank:
        out_Sxm = F.linear(x_Sxc, weight)
        if low_rank:
            out_Sxm = out_Sxm + _low_rank(mode, name or "", x_Sxc).to(out_Sxm.dtype)
    else:
        w_Smc = torch.stack([mode.moved(weight, s) for s in mode.sides])
        out_Sxm = torch.matmul(x_Sxc, w_Smc.transpose(1, 2))
    if bias is not None:
        out_Sxm = out_Sxm + torch.stack([mode.moved(bias, s) for s in mode.sides])[:, None].to(out_Sxm.dtype)
    return out_Sxm.reshape(-1, *parts[0].shape[1:-1], out_Sxm.shape[-1])


def _one_after_another(mode: Sides, x_Sxc: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
    kind = kind_of(x_Sxc)
    out_Sxm = x_Sxc.new_empty(*x_Sxc.shape[:2], len(weight), dtype=kind)
    for side, x_xc, out_xm in zip(mode.sides, x_Sxc, out_Sxm, strict=True):
        mode.linear_into(out_xm, side, x_xc.to(kind), weight, mode.moved(bias, side))
    return out_Sxm


def _low_rank(mode: Sides, name: str, x_Sxc: torch.Tensor) -> torch.Tensor:
    pairs = [mode.directions.factors(name, mode.step, s.k, x_Sxc.device) for s in mode.sides]
    v_Scr = torch.stack([v for _, v in pairs])
    u_Smr = torch.stack([u * s.shift for (u, _), s in zip(pairs, mode.sides, strict=True)])
    return torch.matmul(torch.matmul(x_Sxc, v_Scr.to(x_Sxc.dtype)).float(), u_Smr.transpose(1, 2))


def _elementwise(mode: Sides, func: Function, a: Any, b: Any) -> torch.Tensor:
    """A vector times, plus or minus what it is broadcast to: gains and biases of norms."""
    if mode.name(a) is not None and mode.name(b) is not None:
        raise _no_rule(name_of(func))
    vector, x, first = (a, b, True) if mode.name(a) is not None else (b, a, False)
    if not isinstance(x, torch.Tensor) or vector.dim() > 1 or x.dim() < 2:
        raise _no_rule(name_of(func))

    def one(side: Any, part: torch.Tensor) -> torch.Tensor:
        moved = mode.moved(vector, side)
        return func(moved, part) if first else func(part, moved)

    return _each(mode, one, x)

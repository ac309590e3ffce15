"""A forward pass under other weights, without touching the weights.

Inside `Perturbed`, every torch function that is given one of the parameters gets parameter + shift * direction in its
place, wherever in the model that happens: in the module that owns it, in another one (tied weights), or in a functional
call. The moved tensor lives for that one call, so at most one of them exists at a time (all weights of the call where a
function takes several, as attention does), and of a large linear layer's only a block. Small tensors are moved all at
once, in a place that the next pass takes again (`small`). An embedding makes only the rows that the batch looks up; a
matrix whose direction has low rank is never made: (W + s U V^T) x = W x + s U (V^T x).

The parameters are read and never written: they are the same objects with the same bits before, during and after. This
is not so for the usual way (add, subtract twice, add again), which leaves rounding errors in bfloat16 weights.

Limits. What torch does not ask about reads the unmoved weight: scripted modules and functions, `torch.tensor(p)`,
`x.new_tensor(p)`, `x.data = p`. `probes.Prober.check` compares a pass with one under really moved weights before a run
begins.

Shape legend: n rows of a table, c its columns, m rows of a matrix, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F

from sotto.errors import SottoError
from sotto.zeroth_order import kernels
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.reading import Function, Reading, found_in, name_of, only_about
from sotto.zeroth_order.small import Group, Room
from sotto.zeroth_order.walsh import Stream

BLOCK = 5 << 18
"""Elements of a matrix up to which it is moved as a whole. A quarter above 2^20, so that one of (768, 3072) has two
parts: in three, with 256 outputs each, its product took 5 % longer."""
FEWEST = 384
"""Outputs computed at a time, for the same reason, where they take no more than half the room of the inputs."""
DEVICE_BLOCK = 1 << 24
"""The same on a GPU, which is faster at few large products."""
ALIGNED = 64
"""Outputs are computed so many at a time, or a multiple: products that begin elsewhere took a fifth longer."""

_WRITES = frozenset(["__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"])

Batch = Mapping[str, torch.Tensor]


class Side(NamedTuple):
    """One point at which the loss is taken: the weights plus `shift` times direction `k`."""

    k: int
    shift: float


class Perturbed(Reading):
    """Context: the parameters of `directions` are read as moved."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        directions: Directions,
        step: int,
        sides: Sequence[Side],
        small: Sequence[Group] = (),
    ):
        """Prepares a pass.

        Args:
          parameters: name -> tensor, the names of `directions`. A tensor that several modules share has one name.
          step: which directions.
          sides: where the weights are moved to; more than one for `sides.Sides` only.
          small: those of the parameters that are moved together.
        """
        super().__init__(parameters)
        self.directions, self.step, self.sides = directions, step, tuple(sides)
        self._small = Room(small, len(sides)) if small else None
        self._made: dict[Side, Mapping[int, torch.Tensor]] = {}
        self._room: torch.Tensor | None = None

    def at(self, sides: Sequence[Side]) -> Self:
        """For another pass, with as many other sides. What the one before made of small weights is lost."""
        self.sides = tuple(sides)
        return self

    def __enter__(self) -> Self:
        if self._small is not None:
            self._made = dict(zip(self.sides, self._small.moved(self.step, self.sides), strict=True))
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._room = None  # where a last layer alone needs it, the next pass is widest without it

    def answer(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if only_about(func, args, kwargs):
            return func(*args, **kwargs)
        written, name = self.names.get(id(args[0])) if args else None, name_of(func)
        if written and (name in _WRITES or (name.endswith("_") and not name.startswith("_"))):
            raise _writes(written)
        return self.replace(func, args, kwargs)

    def replace(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is run instead of `func`, which reads a parameter."""
        return self.one_side(func, args, kwargs, self.sides[0])

    def name(self, value: Any) -> str | None:
        return self.names.get(id(value))

    def stream(self, name: str, side: Side) -> Stream | None:
        """What a kernel could add to this parameter."""
        return self.directions.stream(name, self.step, side.k)

    def one_side(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], side: Side) -> Any:
        """The function with every parameter among its arguments moved to this side."""
        if func is F.embedding:
            return self._embedding(func, side, *args, **kwargs)
        if func is F.linear:
            return self.linear(side, *args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs and self.name(args[1]) is None:
            return self._addmm(side, *args)
        if name_of(func) == "__getitem__" and isinstance(args[1], slice) and self.made(args[0], side) is None:
            return self.some_rows(args[0], args[1], side)
        return func(*self._move_all(args, side), **self._move_all(kwargs, side))

    def _move_all(self, value: Any, side: Side) -> Any:
        if isinstance(value, torch.Tensor):
            return self.moved(value, side) if id(value) in self.names else value
        if isinstance(value, dict):
            return {key: self._move_all(part, side) for key, part in value.items()}
        if isinstance(value, tuple | list) and found_in([value], self.names):
            return type(value)(self._move_all(part, side) for part in value)
        return value

    def made(self, value: Any, side: Side) -> torch.Tensor | None:
        """The parameter at this side, if it was moved with the other small ones."""
        return self._made[side].get(id(value)) if self._made else None

    def moved(self, value: Any, side: Side) -> Any:
        """The parameter at this side: a new tensor of its type. Anything that is not perturbed is returned as it is."""
        name = self.names.get(id(value))
        if name is None:
            return value
        made = self.made(value, side)
        if made is not None:
            return made
        out = torch.empty_like(value, requires_grad=False, memory_format=torch.contiguous_format)
        self._move(name, value, side, 0, out.view(-1))
        return out

    def _move(self, name: str, value: torch.Tensor, side: Side, first: int, target: torch.Tensor) -> None:
        """Fills `target` with the moved elements of a parameter from number `first` on."""
        source = value.detach().reshape(-1)[first : first + target.numel()]
        self.directions.add(name, self.step, side.k, side.shift, source, first, target)

    def some_rows(self, value: torch.Tensor, rows: slice, side: Side) -> torch.Tensor:
        """A slice of the parameter along its first axis, at this side; no more of it is made."""
        start, stop, step = rows.indices(len(value))
        if step != 1:
            return self.moved(value, side)[rows]
        out = value.detach().new_empty(max(0, stop - start), *value.shape[1:])
        self._move(self.names[id(value)], value, side, start * math.prod(value.shape[1:]), out.view(-1))
        return out

    def linear(self, side: Side, input: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
        name, input = self.names.get(id(weight)), self.moved(input, side)
        made: Any = weight if name is None else self.made(weight, side)
        if name is None or made is not None:
            return F.linear(input, made, self.moved(bias, side))
        if not self.directions.is_low_rank(name):
            return self._linear_in_blocks(name, side, input, weight, self.moved(bias, side))
        out = F.linear(input, weight, self.moved(bias, side))
        u_mr, v_cr = self.directions.factors(name, self.step, side.k, input.device)
        low = F.linear(input, v_cr.t().to(input.dtype)).float()
        return out + F.linear(low, u_mr * side.shift).to(out.dtype)

    def _linear_in_blocks(
        self, name: str, side: Side, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Some outputs at a time, so that a large moved matrix never exists as a whole."""
        m, c = weight.shape
        rows = _rows_at_once(weight, input.numel() // max(1, c))
        if rows >= m and weight.is_cuda:
            return F.linear(input, self.moved(weight, side), bias)
        if rows >= m:
            room = self._room_of(weight, m * c)
            self._move(name, weight, side, 0, room)
            return F.linear(input, room.view(m, c), bias)
        kind = kind_of(input)
        out_nm = input.new_empty(input.numel() // c, m, dtype=kind)
        self.linear_into(out_nm, side, input.reshape(-1, c).to(kind), weight, bias)
        return out_nm.view(*input.shape[:-1], m)

    def linear_into(
        self, out_nm: torch.Tensor, side: Side, x_nc: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Fills `out_nm` with x W^T + bias, for a perturbed W and a bias that is moved already."""
        m, c = weight.shape
        made, kind = self.made(weight, side), out_nm.dtype
        rows = _rows_at_once(weight, len(x_nc)) if made is None else m
        room = self._room_of(weight, min(rows, m) * c) if made is None else made.reshape(-1)
        for start in range(0, m, rows):
            at = slice(start, min(start + rows, m))
            moved_rc = room[: (at.stop - start) * c].view(-1, c)
            if made is None:
                self._move(self.names[id(weight)], weight, side, start * c, moved_rc.view(-1))
            if bias is None:
                torch.mm(x_nc, moved_rc.t().to(kind), out=out_nm[:, at])
            else:
                torch.addmm(bias[at].to(kind), x_nc, moved_rc.t().to(kind), out=out_nm[:, at])

    def _addmm(self, side: Side, bias: Any, x_nc: torch.Tensor, weight_cm: Any) -> torch.Tensor:
        """Bias + x W, as GPT-2 calls it; of a large matrix some inputs at a time, where adding up loses nothing."""
        name, out_nm = self.name(weight_cm), self.moved(bias, side)
        if name is None or self.directions.is_low_rank(name) or self.made(weight_cm, side) is not None:
            return torch.addmm(out_nm, x_nc, self.moved(weight_cm, side))
        c, m = weight_cm.shape
        whole = torch.is_autocast_enabled(x_nc.device.type) or x_nc.dtype not in (torch.float32, torch.float64)
        whole |= torch.is_grad_enabled()  # as in `_room_of`
        blocks = 1 if whole else max(1, -(-weight_cm.numel() // (DEVICE_BLOCK if weight_cm.is_cuda else BLOCK)))
        rows = max(1, -(-c // blocks))
        room = self._room_of(weight_cm, rows * m)
        for start in range(0, max(c, 1), rows):
            at = slice(start, min(start + rows, c))
            moved_rm = room[: (at.stop - start) * m].view(-1, m)
            self._move(name, weight_cm, side, start * m, moved_rm.view(-1))
            out_nm = torch.addmm(out_nm, x_nc[:, at], moved_rm)
        return out_nm

    def _room_of(self, weight: torch.Tensor, size: int) -> torch.Tensor:
        """(size,) of the weight's own kind, for the moved rows of one call.

        On a CPU it is kept for the pass: memory that is given back there comes again page by page, which took longer
        than to fill it. On a GPU it is not, as a model's memory is highest where activations meet, and not in here. Nor
        where autograd keeps what a call was given.
        """
        if weight.is_cuda or torch.is_grad_enabled():
            return weight.detach().new_empty(size)
        room = self._room
        if room is None or room.numel() < size or room.dtype != weight.dtype or room.device != weight.device:
            self._room = room = None  # before there is another
            self._room = room = weight.detach().new_empty(size)
        return room[:size]

    def _embedding(
        self, func: Function, side: Side, input: torch.Tensor, weight: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Looks up rows of the moved table; makes only those rows when they are few."""
        name = self.names.get(id(weight))
        if (args[1] if len(args) > 1 else kwargs.get("max_norm")) is not None:
            raise _writes(name or "an embedding with max_norm")
        made: Any = weight if name is None else self.made(weight, side)
        if name is None or made is not None:
            return func(input, made, *args, **kwargs)
        made_nc = kernels.add_rows(self.stream(name, side), side.shift, weight.detach(), input.flatten())
        if made_nc is not None:
            return made_nc.view(*input.shape, weight.shape[1])
        rows_n, place = torch.unique(input, return_inverse=True)
        # Single rows cost more than rows one after another, which take a copy of the table.
        if 8 * len(rows_n) > len(weight) and weight.numel() <= BLOCK:
            return func(input, self.moved(weight, side), *args, **kwargs)
        return F.embedding(place, self.moved_rows(name, weight, rows_n, side))

    def moved_rows(self, name: str, table: torch.Tensor, rows_n: torch.Tensor, side: Side) -> torch.Tensor:
        """(n, c) some rows of a table at this side."""
        found_nc = F.embedding(rows_n, table.detach())  # which refuses numbers below zero; an index counts from the end
        return found_nc.add(self.directions.rows(name, self.step, side.k, rows_n), alpha=side.shift).to(table.dtype)


def kind_of(x: torch.Tensor) -> torch.dtype:
    """The type in which a product of this tensor is made."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _rows_at_once(weight: torch.Tensor, inputs: int) -> int:
    """Outputs of a linear layer that are computed at once, for so many inputs; of one size, as few take longer than
    their share."""
    m, c = weight.shape
    most = DEVICE_BLOCK // max(1, c) if weight.is_cuda else max(BLOCK // max(1, c), min(FEWEST, inputs // 2))
    rows = max(1, -(-m // max(1, -(-m // max(1, most)))))
    return rows + (-rows % ALIGNED if rows > ALIGNED else 0)


def _writes(what: str) -> SottoError:
    return SottoError(
        "SOT654",
        what=f"the forward pass writes to {what}",
        where=what,
        why="the loss is compared at two points near the same weights, which must not change in between",
        fix="remove max_norm or the in-place change, or freeze this parameter",
    )

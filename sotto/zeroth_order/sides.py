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
from torch import nn

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

WIDEST = 1 << 20
"""Elements of the widest tensor of a pass up to which several sides share it on a CPU. Beyond, what they share is lost
again: it does not stay near the processor, and its memory comes page by page (benchmarks/RESULTS.md)."""

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
        self.rows = max(len(x) for x in batch.values())
        self.lengths, count = lengths_of(batch), len(self.sides)
        together = {count * length for length in self.lengths}
        self._selections = Selections(self.names, {id(x) for x in stored}, together, _selected)

    def __enter__(self) -> Self:
        super().__enter__()
        self._selections.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._selections.__exit__(None, None, None)
        super().__exit__()

    def stacked(self, value: Any) -> torch.Tensor:
        """(S, ...) the parameter at each side; anything that is not perturbed is the same at all."""
        if self._small is not None and id(value) in self._small.stacked:
            return self._small.stacked[id(value)]
        if self.name(value) is None:
            return value.expand(len(self.sides), *value.shape)
        return torch.stack([self.moved(value, side) for side in self.sides])

    def replace(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function for all sides at once.

        Raises:
          SottoError: SOT653, there is no rule for this function.
        """
        name, first = name_of(func), args[0] if args else None
        if func is F.linear and self.name(first) is None:
            return _linear(self, *args, **kwargs)
        if func is F.layer_norm and self.name(first) is None and _plain_norm(*args, **kwargs):
            return _layer_norm(self, *args, **kwargs)
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


def unfit(error: Exception) -> SottoError:
    """What is said of a model that a pass of several sides ended in an error in."""
    first = str(error).splitlines()[0][:200] if str(error) else ""
    return SottoError(
        "SOT653",
        what="several sides cannot be probed in one pass of this model",
        where="zeroth_order.sides",
        why=f"with the batch repeated once per side it ends in {type(error).__name__}: {first}",
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


def _side_by_side(mode: Sides, x: torch.Tensor) -> torch.Tensor:
    """(S, n, c) all rows of each side, whatever axes they have; no copy where they lie one after another."""
    parts = _split(mode, x)
    if len(x) == len(parts) * len(parts[0]):
        return x.reshape(len(parts), -1, x.shape[-1])
    return torch.stack([part.reshape(-1, x.shape[-1]) for part in parts])


def _laid_out(mode: Sides, out_Snm: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The rows of all sides one after another, with the axes of `x` but for the last."""
    rows = mode.rows if len(x) == 1 else len(x) // len(mode.sides)
    return out_Snm.reshape(len(mode.sides) * rows, *x.shape[1:-1], out_Snm.shape[-1])


def _linear(mode: Sides, input: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
    name, x_Snc = mode.name(weight), _side_by_side(mode, input)
    small = SMALL if input.is_cuda else CPU_SMALL
    if name is None or mode.directions.is_low_rank(name):
        out_Snm = F.linear(x_Snc, weight)
        if name is not None:
            out_Snm = out_Snm + _low_rank(mode, name, x_Snc).to(out_Snm.dtype)
        if bias is not None:
            out_Snm = out_Snm + mode.stacked(bias)[:, None].to(out_Snm.dtype)
    elif len(mode.sides) * weight.numel() > small:
        out_Snm = _one_after_another(mode, x_Snc, weight, bias)
    elif bias is None:
        out_Snm = torch.bmm(x_Snc, mode.stacked(weight).transpose(1, 2))
    else:
        out_Snm = torch.baddbmm(mode.stacked(bias)[:, None], x_Snc, mode.stacked(weight).transpose(1, 2))
    return _laid_out(mode, out_Snm, input)


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
    moved_S1c, x_Snc = mode.stacked(vector).view(len(mode.sides), 1, -1), _side_by_side(mode, x)
    out_Snc = func(moved_S1c, x_Snc) if first else func(x_Snc, moved_S1c)
    return _laid_out(mode, out_Snc.to(torch.result_type(a, b)), x)  # a number alone changes no type


def _plain_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> bool:
    """Whether a norm over the last axis computes in the type of its weights, and so may be taken apart."""
    kinds = {value.dtype for value in (input, weight, bias) if value is not None}
    return (
        weight is not None
        and len(normalized_shape) == 1
        and input.dim() > 1
        and kinds in ({torch.float32}, {torch.float64})
    )


def _layer_norm(
    mode: Sides, input: torch.Tensor, normalized_shape: Any, weight: Any, bias: Any = None, eps: float = 1e-5
) -> Any:
    """One norm for all sides, and then the gain and bias of each."""
    out_Snc = _side_by_side(mode, F.layer_norm(input, normalized_shape, eps=eps))
    gain_S1c = mode.stacked(weight)[:, None]
    if bias is None:
        return _laid_out(mode, out_Snc.mul_(gain_S1c), input)
    return _laid_out(mode, torch.addcmul(mode.stacked(bias)[:, None], out_Snc, gain_S1c, out=out_Snc), input)


# ---- how many sides a pass takes


def how_many(asked: int, width: int | None, batch: Batch) -> int:
    """How many of the sides that were asked for, or on a CPU as many as gain something there.

    Args:
      width: from `width_of`; None where nothing limits them.
      batch: of one side.
    """
    if max(len(x) for x in batch.values()) == 1:  # of one row alone, what lies first could be its tokens as well
        return 1
    if width is None or asked == 1:
        return asked
    fitting = WIDEST // (width * max(1, *(x.numel() for x in batch.values())))
    return max(1, min(asked, fitting - fitting % 2))


def few_and_one(batch: Batch) -> dict[str, torch.Tensor]:
    """Some rows of a batch and one of them shortened, where a mask says how long it is; not as many as the batch has.

    So a model that sorts texts by their lengths has something to sort.
    """
    few = 3 if len(next(iter(batch.values()))) == 3 else 2
    found = {name: torch.cat([x[:few], x[:1]]) for name, x in batch.items()}
    mask = found.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        kept = mask[-1].cumsum(0) <= (mask[-1].sum() // 2).clamp(min=1)
        mask[-1] = torch.where(kept, mask[-1], torch.zeros_like(mask[-1]))
    return found


def width_of(model: nn.Module) -> int:
    """The most numbers that a layer gives or takes for a token, but for a frozen output layer: some words at a time."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    frozen = isinstance(head, nn.Module) and not any(p.requires_grad for p in head.parameters())
    layers = (m for m in model.modules() if not isinstance(m, nn.Embedding) and not (frozen and m is head))
    return max((max(p.shape) for m in layers for p in m.parameters(recurse=False) if p.dim() == 2), default=1)

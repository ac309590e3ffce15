"""Rows that a model selects, followed through a pass of several sides.

Which row belongs to which side is told from its place. Tokens that a model picks out, as experts do, have lost theirs:
taken for those of a side, they would make a text's loss depend on what other texts select.

Limits. Not followed is what scripted functions, nested tensors and the inside of a `torch.vmap` select. The check of
the first batch (`probes.Prober.check`), with texts of several lengths, is what finds those.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from sotto.zeroth_order.reading import Function, found_in, name_of, tensors_in

_ALONG = frozenset(
    ["index_select", "gather", "take_along_dim", "sort", "argsort", "topk", "roll", "flip", "repeat_interleave"]
)
"""Take what lies along an axis in another order; the axis is an argument."""
_INTO = frozenset(
    ["index_add", "index_copy", "index_put", "index_reduce", "put", "scatter", "scatter_add", "scatter_reduce"]
    + ["masked_scatter"]
)
"""Put rows in other places."""
_FLAT = frozenset(
    ["masked_select", "take", "index", "msort", "flipud", "rot90", "unique", "unique_consecutive", "unique_dim"]
)
"""Take rows, or elements, in another order, and never along another axis alone."""
_PIECES = frozenset(
    ["unbind", "__iter__", "split", "chunk", "tensor_split", "split_with_sizes", "narrow", "narrow_copy", "select"]
    + ["unsafe_split", "unsafe_chunk", "slice"]
)
"""Take some of what lies along an axis, or each by itself."""
_SECOND = frozenset(
    ["index_select", "gather", "sort", "argsort", "flip", "unbind", "narrow", "narrow_copy", "select", "slice"]
)
"""Whose axis is the second argument; of others it is the third."""
_ROWS = frozenset(["embedding", "embedding_bag"])
_MAY = frozenset(
    name + end
    for name in ("__getitem__", "__setitem__", *_ROWS, *_ALONG, *_PIECES, *_INTO, *_FLAT)
    for end in ("", "_")
)
"""Anything else selects nothing. Asked first: nearly all functions of a pass are of this kind."""


class Selections(TorchFunctionMode):
    """Context: a function that gets one of the parameters must not get rows that were selected, or come of such.

    Attributes:
      names: ids of the parameters.
      stored: ids of what else the model holds: to look rows up there selects none of the batch.
    """

    def __init__(self, names: Collection[int], stored: Collection[int], lengths: Collection[int], refuse: Any):
        """Prepares a pass.

        Args:
          names, stored: as above.
          lengths: of axes along which all rows of the repeated batch lie, or their tokens.
          refuse: makes the error of a function's name.
        """
        super().__init__()
        self._lengths = lengths
        self.names, self.stored, self._refuse = names, stored, refuse
        self._selected: Any = WeakIdKeyDictionary()
        self._any = False

    def __enter__(self) -> Self:
        self._selected.clear()
        self._any = False
        return super().__enter__()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        if "." in name:  # an overload of an operator of torch.ops
            name = name.partition(".")[0]
        if name not in _MAY and not self._any:
            return func(*args, **kwargs)
        tainted = self._any and any(map(self._is_selected, tensors_in((args, kwargs))))
        if tainted and found_in([*args, *kwargs.values()], self.names):
            raise self._refuse(name)
        out = func(*args, **kwargs)
        if tainted or self._selects(name, args, kwargs):
            written = [args[0]] if args and (name == "__setitem__" or name.endswith("_")) else []
            for tensor in tensors_in([out, *written]):
                self._selected[tensor] = self._any = True
                if tensor._base is not None:  # of which it is a view, as others may be
                    self._selected[tensor._base] = True
        return out

    def _is_selected(self, tensor: torch.Tensor) -> bool:
        return tensor in self._selected or (tensor._base is not None and tensor._base in self._selected)

    def _selects(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name in _ROWS:  # which looks up rows of whatever it is given
            source = args[1] if len(args) > 1 else kwargs.get("weight")
            return not (id(source) in self.stored or id(source) in self.names)
        source = args[0] if args else kwargs.get("input")
        # A mask is taken apart everywhere, to say who attends to whom, and becomes nothing that a weight is given.
        if not isinstance(source, torch.Tensor) or source.dtype == torch.bool or id(source) in self.stored:
            return False
        if name == "__setitem__" and not (isinstance(args[2], torch.Tensor) and args[2].dim() > 0):
            return False  # one number goes wherever it should
        if name in ("__getitem__", "__setitem__"):
            return any(self._takes(source, axis, part) for axis, part in _parts(args[1], source))
        if name in _PIECES:
            return any(self._lie_along(source, axis) for axis in _axes(name, args, kwargs, source))
        if name in _ALONG:
            return any(axis == 0 or self._lie_along(source, axis) for axis in _axes(name, args, kwargs, source))
        return name in _FLAT or name.rstrip("_") in _INTO

    def _takes(self, source: torch.Tensor, axis: int, part: Any) -> bool:
        if isinstance(part, slice) and part.indices(source.shape[axis]) == (0, source.shape[axis], 1):
            return False
        return self._lie_along(source, axis) or (axis == 0 and not isinstance(part, slice | int))

    def _lie_along(self, source: torch.Tensor, axis: int) -> bool:
        """Whether all rows of the batch may lie along this axis: an axis of that length, and none before all others."""
        if source.dim() == 0 or source.shape[axis] not in self._lengths:
            return False
        return axis == 0 or source.shape[0] not in self._lengths


def _parts(index: Any, source: torch.Tensor) -> list[tuple[int, Any]]:
    """An axis and what is taken along it, for each part of an index."""
    parts = [part for part in (index if isinstance(index, tuple) else (index,)) if part is not None]
    wide = [part.dim() if isinstance(part, torch.Tensor) and part.dtype == torch.bool else 1 for part in parts]
    wide = [0 if isinstance(part, bool) else n for part, n in zip(parts, wide, strict=True)]
    open_ = source.dim() - sum(n for part, n in zip(parts, wide, strict=True) if part is not Ellipsis)
    found, axis = [], 0
    for part, n in zip(parts, wide, strict=True):
        if part is not Ellipsis:
            found += [(at, part) for at in range(axis, min(axis + n, source.dim()))]
        axis += open_ if part is Ellipsis else n
    return found


def _axes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], source: torch.Tensor) -> list[int]:
    """The axes that a function goes along; 0, which is refused, where none is told and it means all."""
    place = 1 if name in _SECOND else 2
    missing = -1 if name in ("sort", "argsort", "topk") else 0
    told = kwargs.get("dim", kwargs.get("dims", args[place] if len(args) > place else missing))
    several = told if isinstance(told, tuple | list) else (told,)
    return [axis % max(source.dim(), 1) if isinstance(axis, int) else 0 for axis in several]

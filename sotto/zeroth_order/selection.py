"""Rows that a model selects, followed through a pass of several sides.

Which row belongs to which side is told from its place. Tokens that a model picks out, as experts do, have lost theirs:
taken for those of a side, they would make a text's loss depend on what other texts select.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from sotto.zeroth_order.reading import Function, found_in, name_of, tensors_in

_ALONG = frozenset(["index_select", "gather", "take_along_dim", "sort", "argsort", "topk", "roll", "flip"])
"""Take what lies along an axis in another order; the axis is an argument."""
_INTO = frozenset(["index_add", "index_copy", "index_put", "scatter", "scatter_add", "scatter_reduce"])
"""Put rows in other places."""
_FLAT = frozenset(["masked_select", "take"])


class Selections(TorchFunctionMode):
    """Context: a function that gets one of the parameters must not get rows that were selected, or come of such.

    Attributes:
      names: ids of the parameters.
      stored: ids of what else the model holds: to look rows up there selects none of the batch.
    """

    def __init__(self, names: Collection[int], stored: Collection[int], refuse: Any):
        """Args: `refuse` makes the error of a function's name."""
        super().__init__()
        self.names, self.stored, self._refuse = names, stored, refuse
        self._selected: Any = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        tainted = bool(self._selected) and any(t in self._selected for t in tensors_in((args, kwargs)))
        if tainted and found_in([*args, *kwargs.values()], self.names):
            raise self._refuse(name)
        out = func(*args, **kwargs)
        if tainted or self._selects(name, args, kwargs):
            written = [args[0]] if args and (name == "__setitem__" or name.endswith("_")) else []
            for tensor in tensors_in([out, *written]):
                if tensor.is_floating_point():
                    self._selected[tensor] = True
        return out

    def _selects(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name == "embedding":  # which looks up rows of whatever it is given
            source = args[1] if len(args) > 1 else kwargs.get("weight")
            return not (id(source) in self.stored or id(source) in self.names)
        source = args[0] if args else kwargs.get("input")
        if not isinstance(source, torch.Tensor) or not source.is_floating_point() or id(source) in self.stored:
            return False
        if name == "__getitem__":
            return _by_tensor(args[1])
        if name == "__setitem__":
            return _by_tensor(args[1]) and isinstance(args[2], torch.Tensor) and args[2].dim() > 0
        return name in _FLAT or name.rstrip("_") in _INTO or (name in _ALONG and _axis(name, args, kwargs, source) == 0)


def _by_tensor(index: Any) -> bool:
    """Whether an index may take rows by number; one that comes after a slice takes something else of each row."""
    parts = [part for part in (index if isinstance(index, tuple) else (index,)) if part is not None]
    if parts and parts[0] is Ellipsis:  # which may stand for no axis at all
        return any(isinstance(part, list | torch.Tensor) for part in parts)
    return bool(parts) and (isinstance(parts[0], list) or (isinstance(parts[0], torch.Tensor) and parts[0].dim() > 0))


def _axis(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], source: torch.Tensor) -> int:
    """The axis that a function goes along; 0, which is refused, where it is not told."""
    place = 1 if name in ("index_select", "gather", "sort", "argsort", "flip") else 2
    axis = kwargs.get("dim", kwargs.get("dims", args[place] if len(args) > place else 0 if name == "roll" else -1))
    return axis % max(source.dim(), 1) if isinstance(axis, int) else 0

"""What is known of tensors without data: enough to answer what code asks of their values when all is well.

A norm is above a small constant, an error below what it is held against, nothing is infinite; and what began as zeros
or ones is followed for as long as its elements are all alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

VALUE = "_sotto_value"
"""Attribute of a tensor whose elements are all alike: their value. (Weak references would keep modules from moving.)"""
ENDS = "_sotto_ends"
"""Attribute of token ids of whole texts, and of masks made by comparing them: every row has one end-of-text token."""
_KEEP_ZERO = frozenset({"linalg_vector_norm", "neg", "abs", "pow", "sqrt"})
_MOVE = """view _unsafe_view reshape expand select slice index clone _to_copy detach alias squeeze unsqueeze t transpose
    permute split unbind expand_as repeat cat stack"""
_SHAPES = frozenset(_MOVE.split())
"""Operations whose results hold the elements of what goes in."""


def is_empty(x: Any) -> bool:
    """Whether a tensor has no data."""
    return isinstance(x, FakeTensor) or (isinstance(x, torch.Tensor) and x.is_meta)


class Answers:
    """What is known of fake tensors whose elements are all alike; enough to answer what code asks of its values."""

    def of(self, x: Any) -> Any:
        if isinstance(x, list | tuple) and x:  # tensors that are put together
            return self.of(x[0]) if len({self.of(y) for y in x}) == 1 else None
        return getattr(x, VALUE, None) if isinstance(x, torch.Tensor) else x

    def note(self, func: Any, args: Sequence[Any], out: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        if func._schema.is_mutable:
            for x in pytree.tree_leaves(args):
                if isinstance(x, torch.Tensor) and hasattr(x, VALUE):
                    delattr(x, VALUE)
            if name in ("zero_", "fill_"):
                setattr(args[0], VALUE, 0 if name == "zero_" else self.of(args[1]))
            return
        if name in ("index", "_to_copy", "slice", "clone", "detach", "eq") and args and hasattr(args[0], ENDS):
            setattr(out, ENDS, True)
        for x in out if isinstance(out, tuple | list) else (out,):
            value = self._value(name, args, x) if is_empty(x) and args else None
            if value is not None:
                setattr(x, VALUE, value)

    def _value(self, name: str, args: Sequence[Any], out: torch.Tensor) -> Any:
        first = self.of(args[0])
        second = self.of(args[1]) if len(args) > 1 else None
        if name in ("ones_like", "new_ones"):
            return 1
        if name in ("zeros_like", "new_zeros"):
            return 0
        if name in ("isinf", "isposinf", "isneginf"):
            return False
        if name in ("eq", "ne") and args[0] is args[1]:  # how torch finds a nan
            return name == "eq"
        if name in ("gt", "ge", "lt", "le", "eq", "ne"):
            return self._compare(name, first, second, isinstance(args[1], torch.Tensor))
        if name.endswith("_backward") and first == 0:
            return 0
        if name in ("mm", "bmm", "mul", "div") and 0 in (first, second):
            return 0
        if name == "addmm" and first == 0 and 0 in (second, self.of(args[2])):
            return 0
        if first is None and name == "sum" and args[0].dtype is torch.bool:
            first = True  # what is counted is there
        if first is None:
            return None
        if name in ("all", "any", *_SHAPES):
            return first
        if name in ("bitwise_not", "logical_not"):
            return not first
        if name in ("bitwise_and", "logical_and", "mul") and second is not None:
            return first and second if out.dtype is torch.bool else first * second
        if name in ("bitwise_or", "logical_or") and second is not None:
            return first or second
        if name == "sum":
            return first * (args[0].numel() // max(1, out.numel()))
        if first == 0 and (name in _KEEP_ZERO or (name == "add" and second == 0)):
            return 0
        return None

    @staticmethod
    def _compare(name: str, first: Any, second: Any, measured: bool) -> bool:
        """Of unknown values: norms and losses are above a constant, and errors are below what they are held against."""
        if first is not None and second is not None:
            return bool({"gt": first > second, "ge": first >= second, "lt": first < second, "le": first <= second,
                         "eq": first == second, "ne": first != second}[name])  # fmt: skip
        if name in ("eq", "ne"):
            return name == "ne"
        return (name in ("lt", "le")) == measured

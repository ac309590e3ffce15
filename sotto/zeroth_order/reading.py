"""Who reads a parameter: torch functions that are given one are answered by somebody else.

While a `Reading` is entered, its parameters belong to a subclass of their own class, and torch asks that subclass to
answer each function that gets one of them. Nothing else of a pass is looked at; a mode that looks at every function
took a third of the time of a narrow model's pass, before it did anything. The tensors themselves, and their elements,
stay what they were.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import nn

from sotto.errors import SottoError

Function = Callable[..., Any]

# What asks a tensor about itself and not about its values. Anything else is taken to read the values.
_ABOUT = frozenset(
    [
        "dim",
        "size",
        "numel",
        "stride",
        "nelement",
        "ndimension",
        "element_size",
        "storage_offset",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "data_ptr",
        "get_device",
        "is_pinned",
        "is_same_size",
        "__len__",
        "__hash__",
        "__repr__",
        "requires_grad_",
    ]
)
# Made once: a union of types in each question would take longer than the answer.
_SEQUENCES, _NESTED = (tuple, list), (tuple, list, dict)
_PLAIN = frozenset([torch.Tensor, nn.Parameter, int, float, bool, type(None)])
"""Has no tensors in it."""


def name_of(function: Function) -> str:
    return getattr(function, "__name__", "")


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, _SEQUENCES):
        return [t for part in value for t in tensors_in(part)]
    return [t for part in value.values() for t in tensors_in(part)] if isinstance(value, dict) else []


def found_in(values: Iterable[Any], ids: Container[int]) -> list[int]:
    """The ids of those among the values, or in a list, tuple or dictionary of them, that are in `ids`."""
    found: list[int] = []
    for value in values:
        if id(value) in ids:
            found.append(id(value))
        elif type(value) in _PLAIN:
            continue
        elif isinstance(value, _NESTED):
            found += [id(t) for t in tensors_in(value) if id(t) in ids]
    return found


def only_about(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call that gets a tensor asks for its shape, type or the like, and for none of its elements."""
    name = name_of(func)
    if name in ("__get__", "type"):
        return not isinstance(func(*args, **kwargs), torch.Tensor)  # .shape against .data and .T
    return name in _ABOUT


def reads_values(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Container[int]
) -> list[int]:
    """The parameters (given by their ids) in which this call reads what is in them, and not only a shape or type."""
    found = found_in(args, parameters)
    if kwargs:
        found += found_in(kwargs.values(), parameters)
    return [] if not found or only_about(func, args, kwargs) else found


class _Uncompiled:
    """Context, for any number of threads at once: what `torch.compile` made runs as it was written.

    It has no way to compile what belongs to another class for a while.
    """

    def __init__(self) -> None:
        self._lock, self._within, self._stack = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._within == 0:
                self._stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0:
                self._stack.close()


class Reading:
    """Context: `answer` is run in the place of each torch function that gets one of the parameters.

    One at a time in a thread, and one at a time of a parameter. Other threads that run the model meanwhile get what
    torch would have given them. What `torch.compile` made runs uncompiled.

    Attributes:
      names: id of a parameter -> its name.
      asked: whether any function was answered yet.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]):
        self.names = {id(p): name for name, p in parameters.items()}
        self.asked = False
        self._tensors = list(parameters.values())
        self._stack = ExitStack()

    def answer(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a function that gets one of the parameters at least. In here, no function asks."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """
        Raises:
          SottoError: SOT658, one of the parameters, or this thread, is within such a context already.
        """
        with ExitStack() as stack:
            stack.enter_context(_uncompiled)
            with _belonging:
                kinds = [type(p) for p in self._tensors]
                if _entered.get() is not None or any(issubclass(kind, _Watched) for kind in kinds):
                    raise _twice()
                stack.callback(self._belong, kinds)
                self._belong([_watched(kind) for kind in kinds])
            stack.callback(_entered.set, None)
            _entered.set(self)
            self._stack = stack.pop_all()
        return self

    def _belong(self, kinds: Sequence[type]) -> None:
        for p, kind in zip(self._tensors, kinds, strict=True):
            p.__class__ = kind

    def __exit__(self, *_: object) -> None:
        self._stack.close()


_uncompiled, _belonging = _Uncompiled(), threading.Lock()
_entered: ContextVar[Reading | None] = ContextVar("the reading of this thread", default=None)


class _Watched:
    """Marks the classes that `_watched` makes."""


@functools.cache
def _watched(kind: Any) -> type:
    """A subclass of a class of tensors, of which torch asks who answers."""

    def ask(
        cls: type, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        reading = _entered.get()
        if reading is None:
            return kind.__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            reading.asked = True
            return reading.answer(func, args, kwargs or {})

    def copy(self: Any, memo: Any) -> Any:
        copied = kind.__deepcopy__(self, memo)
        copied.__class__ = kind  # the copy stays when the pass has ended
        return copied

    return type(kind.__name__, (kind, _Watched), {"__torch_function__": classmethod(ask), "__deepcopy__": copy})


def _twice() -> SottoError:
    return SottoError(
        "SOT658",
        what="a model is probed within a probe of it, or by two threads at once",
        where="zeroth_order.reading",
        why="each would read the weights as the other moved them",
        fix="probe a model in one thread, and no other model in its forward pass; or give each thread a copy",
    )

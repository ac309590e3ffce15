"""What lies before the first perturbed weight, computed once per batch.

All probes of a batch see the same input and, up to the first parameter that is perturbed, the same weights. `capture`
runs the model up to that point and keeps what the frozen modules gave; `Prefix.replay` lets them give it again instead
of computing it. Training the upper layers, adapters in them, or only the head then costs only those layers; everything
between and above is run as it is.

What is kept is what is needed. A frozen module's output that went into other frozen modules only, and is gone when the
first perturbed weight is read, can never be asked for again: in its place stands a tensor of its shape without memory.
So of a stack of frozen layers only the last output is kept.

Beside a side network the frozen layers come after the first perturbed weight, but read none: what the side network sees
of them is kept as well, and they do not run again.

Shape legend: B rows of the batch; outputs have any shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sotto.zeroth_order.deterministic import require_no_randomness
from sotto.zeroth_order.perturb import Batch
from sotto.zeroth_order.reading import Function, name_of, reads_values, tensors_in


class _Reached(Exception):
    """The first perturbed parameter is about to be read."""


@dataclass
class _Forgotten:
    """An output that nothing needs: only its shape is left."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def stand_in(self) -> torch.Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


@dataclass
class _Slot:
    """The place of a tensor in an output, until it is known whether it is kept."""

    number: int


@dataclass
class Prefix:
    """What frozen modules gave before the first perturbed weight.

    Attributes:
      outputs: module -> what its calls gave, in order.
      lengths: of what has a part for each row (`lengths_of`).
      model: one with a side network, or None.
      beside: what the side network sees of the frozen layers, by index.
    """

    outputs: dict[nn.Module, list[Any]]
    lengths: frozenset[int]
    model: Any = None
    beside: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])

    @contextmanager
    def replay(self, repeats: int = 1) -> Iterator[None]:
        """Within it, the kept modules give what they gave, their rows repeated `repeats` times."""
        before = {module: module.__dict__.get("forward") for module in self.outputs}
        for module, outputs in self.outputs.items():
            module.forward = self._giver(outputs, module.forward, repeats)  # type: ignore[method-assign]
        repeated = {index: self._repeat(x, repeats) for index, x in self.beside.items()}
        try:
            with self.model.fed(repeated) if repeated else nullcontext():
                yield
        finally:
            for module, own in before.items():
                del module.forward
                if own is not None:  # another library had put its own in place
                    module.forward = own

    def _giver(self, outputs: list[Any], compute: Function, repeats: int) -> Function:
        waiting = iter(outputs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            for output in waiting:
                return _map(output, lambda kept: self._repeat(kept, repeats))
            return compute(*args, **kwargs)  # a later call, after the first perturbed weight

        return forward

    def _repeat(self, kept: torch.Tensor | _Forgotten, repeats: int) -> torch.Tensor:
        x = kept.stand_in() if isinstance(kept, _Forgotten) else kept
        if repeats == 1 or x.dim() == 0 or x.shape[0] not in self.lengths:
            return x  # positions and masks that all rows share
        return x.expand(repeats, *x.shape).flatten(0, 1) if isinstance(kept, torch.Tensor) else _Forgotten(
            torch.Size((repeats * x.shape[0], *x.shape[1:])), x.dtype, x.device
        ).stand_in()  # fmt: skip


@dataclass
class _Recorder(TorchFunctionMode):
    """Follows the outputs of frozen modules until a perturbed parameter is read."""

    perturbed: set[int]
    depth: int = 0
    order: list[tuple[nn.Module, Any]] = field(default_factory=list)
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    seen: dict[int, tuple[weakref.ref[torch.Tensor], _Forgotten]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        require_no_randomness(func, args, kwargs)
        if reads_values(func, args, kwargs, self.perturbed):
            raise _Reached
        if self.depth == 0 and name_of(func) != "__get__":
            for x in tensors_in([args, kwargs]):
                self._keep(x)
        return func(*args, **kwargs)

    def _keep(self, x: torch.Tensor) -> None:
        for number, (reference, _) in self.seen.items():
            if reference() is x:
                self.kept[number] = x

    def enter(self, module: nn.Module, args: Any) -> None:
        self.depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.order.append((module, _map(output, self._number)))

    def _number(self, x: torch.Tensor) -> _Slot:
        for number, (reference, _) in self.seen.items():
            if reference() is x:
                return _Slot(number)
        self.seen[len(self.seen)] = (weakref.ref(x), _Forgotten(x.shape, x.dtype, x.device))
        return _Slot(len(self.seen) - 1)

    def finish(self) -> dict[nn.Module, list[Any]]:
        """Settles what is kept. Whatever is still alive here is held by the model's own forward, and needed."""
        for number, (reference, _) in self.seen.items():
            if (alive := reference()) is not None:
                self.kept[number] = alive
        outputs: dict[nn.Module, list[Any]] = {}
        for module, output in self.order:
            outputs.setdefault(module, []).append(_map(output, self._settle, _Slot))
        return outputs

    def _settle(self, slot: _Slot) -> torch.Tensor | _Forgotten:
        return self.kept.get(slot.number, self.seen[slot.number][1])


def capture(
    model: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    forward: Callable[[Batch], torch.Tensor],
    batch: Batch,
    frozen: Sequence[nn.Module],
) -> Prefix:
    """Runs the model on a batch up to the first of `parameters`, under `no_grad`, and keeps what is needed.

    Args:
      frozen: its modules that `frozen_modules` finds.
      forward: runs the model on a batch; its result is not used.
      batch: tensors with B rows each.
    """
    perturbed = {id(p) for p in parameters.values()}
    recorder = _Recorder(perturbed)
    hooks: list[Any] = []
    for module in frozen:
        hooks.append(module.register_forward_pre_hook(recorder.enter))
        hooks.append(module.register_forward_hook(recorder.leave))
    outputs: dict[nn.Module, list[Any]] = {}
    try:
        if frozen:
            with torch.no_grad(), recorder:
                forward(batch)
    except _Reached:
        outputs = recorder.finish()  # in here the frames of the forward pass, and what they hold, are still alive
    finally:
        for hook in hooks:
            hook.remove()
    prefix = Prefix(outputs, lengths_of(batch))
    beside: Any = model if hasattr(model, "noting") else None
    if beside is not None and perturbed.isdisjoint(map(id, beside.stack.layers.parameters())):
        with torch.no_grad(), prefix.replay(), beside.noting() as seen:
            forward(batch)
        prefix.model, prefix.beside = beside, seen
    return prefix


def lengths_of(batch: Mapping[str, torch.Tensor]) -> frozenset[int]:
    """Of first axes with a part for each row: the rows themselves, or their tokens one after another."""
    return frozenset(x.shape[:n].numel() for x in batch.values() for n in range(1, x.dim() + 1))


def frozen_modules(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> list[nn.Module]:
    """The largest modules with weights, none of them among the parameters. The model itself is not among them."""
    perturbed = {id(p) for p in parameters.values()}
    return list(dict.fromkeys(part for child in model.children() for part in _parts(child, perturbed).frozen))


class _Parts(NamedTuple):
    """The largest frozen modules in a module, or it alone; whether it has weights; whether one of them is perturbed."""

    frozen: list[nn.Module]
    weights: bool
    perturbed: bool


def _parts(module: nn.Module, perturbed: set[int]) -> _Parts:
    own = [id(p) for p in module.parameters(recurse=False)]
    below = [_parts(child, perturbed) for child in module.children()]
    weights = bool(own) or any(part.weights for part in below)
    moved = not perturbed.isdisjoint(own) or any(part.perturbed for part in below)
    if weights and not moved and type(module).forward is not nn.Module.forward:
        return _Parts([module], weights, moved)
    return _Parts([found for part in below for found in part.frozen], weights, moved)


def _map(value: Any, change: Callable[[Any], Any], kind: Any = (torch.Tensor, _Forgotten)) -> Any:
    """Applies `change` to every tensor (or what stands for one) in a module's output, which keeps its type."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return type(value)(**{key: _map(part, change, kind) for key, part in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(part, change, kind) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(part, change, kind) for part in value)
    return value

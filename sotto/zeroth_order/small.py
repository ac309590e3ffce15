"""The small tensors of a model, moved all at once: to begin with one takes longer than to move it, on any device.

Shape legend: e flat elements, of all tensors of a group one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from sotto.zeroth_order import processor
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.kernels import kernel_for
from sotto.zeroth_order.walsh import Stream

LARGEST = 1 << 16
"""Elements up to which a tensor is moved with others."""
GROUP, DEVICE_GROUP = 1 << 20, 1 << 24
"""Elements that are moved together, on a CPU and elsewhere."""
MOST = 1 << 20
"""Elements of all groups of a pass on a CPU, where they stay until its end. A model that has more of them computes long
enough with each to move the others alone."""


class Group:
    """Small tensors of one type on one device, that lie one after another when they are moved.

    Attributes:
      names, tensors, sizes: of each.
      chunk: elements that are moved at once: all of them.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], directions: Directions):
        """Their elements may change later, and nothing else about them."""
        self.names, self.tensors = list(parameters), list(parameters.values())
        self.sizes, self._directions = [p.numel() for p in self.tensors], directions
        self.chunk = sum(self.sizes)
        streams = [directions.stream(name, 0, 0) for name in self.names]
        self._mover = _mover(streams[0], self.tensors[0])
        fake = isinstance(self.tensors[0].data, FakeTensor)
        self._tables = None if fake else self._mover.tables(streams, self.sizes, self.tensors[0].device)

    def empty(self) -> torch.Tensor:
        """(e,) a place for them."""
        return self.tensors[0].detach().new_empty(self.chunk)

    def views(self, flat_e: torch.Tensor) -> list[torch.Tensor]:
        """Of what lies in such a place, each in the shape of its tensor."""
        return [part.view(p.shape) for part, p in zip(flat_e.split(self.sizes), self.tensors, strict=True)]

    def weights(self) -> torch.Tensor:
        """(e,) the tensors; `take` gives them what becomes of it."""
        return self.put(self.empty())

    def put(self, flat_e: torch.Tensor) -> torch.Tensor:
        """Fills a place with the tensors, and returns it."""
        return torch.cat([p.detach().reshape(-1) for p in self.tensors], out=flat_e)

    def take(self, flat_e: torch.Tensor) -> None:
        """Gives the tensors what lies in a place."""
        torch._foreach_copy_([p.detach() for p in self.tensors], self.views(flat_e))

    def add(self, step: int, k: int, factor: float, flat_e: torch.Tensor, first: int = 0) -> None:
        """Adds factor * u to what lies in a place; all of it at once."""
        assert (first, len(flat_e)) == (0, self.chunk)
        if self._tables is not None:  # in a forecast what takes memory is made, and nothing is run
            self._mover.add_many(self._directions.stream(self.names[0], step, k), factor, flat_e, self._tables)


class Room:
    """Small tensors at one side or several, and then at as many others in the same place.

    Attributes:
      stacked: id of a parameter that is in a group -> (S, ...) the parameter at each of S sides.
    """

    def __init__(self, groups: Sequence[Group], sides: int = 1):
        self._places = [(group, group.tensors[0].detach().new_empty(sides, group.chunk)) for group in groups]
        self.stacked = {
            id(p): part_Se.view(sides, *p.shape)
            for group, flat_Se in self._places
            for p, part_Se in zip(group.tensors, flat_Se.split(group.sizes, 1), strict=True)
        }
        views = {key: stacked.unbind() for key, stacked in self.stacked.items()}
        self._views = [{key: of_each[side] for key, of_each in views.items()} for side in range(sides)]

    def moved(self, step: int, points: Sequence[tuple[int, float]]) -> Sequence[Mapping[int, torch.Tensor]]:
        """id of a parameter -> the parameter + shift * u_k, until the next call, for each (k, shift)."""
        for group, flat_Se in self._places:
            sides = flat_Se.unbind()
            group.put(sides[0])
            for flat_e in sides[1:]:
                flat_e.copy_(sides[0])
            for flat_e, (k, shift) in zip(sides, points, strict=True):
                group.add(step, k, shift, flat_e)
        return self._views


def groups(
    parameters: Mapping[str, torch.Tensor], directions: Directions, exact: bool = False, most: int | None = None
) -> list[Group]:
    """Groups of those of the parameters that are small, and that `processor` or a kernel can move.

    Args:
      exact: as for `Directions.add`.
      most: elements of all groups together, on a CPU; the smallest tensors are taken. None is no limit.
    """
    fitting = {name: p for name, p in parameters.items() if _fits(directions.stream(name, 0, 0), p, exact)}
    fitting = fitting if most is None else _smallest(fitting, most)
    kinds: dict[Any, list[dict[str, torch.Tensor]]] = {}
    sizes: dict[Any, int] = {}
    for name, p in fitting.items():
        kind, whole = (p.device, p.dtype, directions.part[name]), GROUP if p.device.type == "cpu" else DEVICE_GROUP
        sizes[kind] = sizes.get(kind, whole) + p.numel()
        if sizes[kind] > whole:
            kinds.setdefault(kind, []).append({})
            sizes[kind] = p.numel()
        kinds[kind][-1][name] = p
    return [Group(some, directions) for found in kinds.values() for some in found]


def _fits(stream: Stream | None, tensor: torch.Tensor, exact: bool) -> bool:
    mover = _mover(stream, tensor) if 0 < tensor.numel() <= LARGEST else None
    if stream is None or mover is None:
        return False
    return mover is processor or not exact or stream.places is None


def _smallest(parameters: Mapping[str, torch.Tensor], most: int) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}
    for name, p in sorted(parameters.items(), key=lambda pair: pair[1].numel()):
        most -= p.numel() if p.device.type == "cpu" else 0
        if most >= 0:
            kept[name] = p
    return {name: p for name, p in parameters.items() if name in kept}


def _mover(stream: Stream | None, tensor: torch.Tensor) -> Any:
    """The module that moves tensors like this one; None if there is none."""
    return processor if processor.reaches(stream, tensor) else kernel_for(stream, tensor)

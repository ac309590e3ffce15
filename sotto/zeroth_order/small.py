"""The small tensors of a model, moved all at once: to begin with one takes longer than to move it, on any device.

Shape legend: e flat elements, of all tensors of a group one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from sotto.zeroth_order import processor
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.kernels import kernel_for
from sotto.zeroth_order.walsh import Stream

LARGEST = 1 << 16
"""Elements up to which a tensor is moved with others."""
GROUP = 1 << 18
"""Elements that are moved together on a CPU, where more would take room and no less time."""


class Small:
    """Those of a model's tensors that are moved together; none where neither `processor` nor a kernel can do it."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], directions: Directions):
        """Chooses them. Their elements may change later, and nothing else about them."""
        self._directions = directions
        kinds: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, p in parameters.items():
            stream = directions.stream(name, 0, 0) if 0 < p.numel() <= LARGEST else None
            if _mover(stream, p) is not None:
                kinds.setdefault((p.device, p.dtype), []).append(name)
        groups = [group for names in kinds.values() for group in _groups(names, parameters)]
        self._groups = [_Group(names, [parameters[n] for n in names], directions) for names in groups]

    def room(self) -> Room:
        """For them at one side; of their size."""
        return Room(self._directions, self._groups)


class Room:
    """The small tensors at one side, and then at another in the same place."""

    def __init__(self, directions: Directions, groups: list[_Group]):
        self._directions, self._groups = directions, groups
        self._flats = [group.empty() for group in groups]
        self._views = {
            id(p): part.view(p.shape)
            for group, flat_e in zip(groups, self._flats, strict=True)
            for p, part in zip(group.tensors, flat_e.split(group.sizes), strict=True)
        }

    def moved(self, step: int, k: int, shift: float) -> Mapping[int, torch.Tensor]:
        """id of a parameter -> the parameter + shift * u, until the next call; of those alone that are moved here."""
        for group, flat_e in zip(self._groups, self._flats, strict=True):
            group.move(self._directions.stream(group.first, step, k), shift, flat_e)
        return self._views


def _groups(names: list[str], parameters: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names of tensors of one kind, in their order: on a CPU in several groups."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in names:
        p = parameters[name]
        if p.device.type == "cpu" and size + p.numel() > GROUP:
            groups, size = [*groups, []], 0
        groups[-1].append(name)
        size += p.numel()
    return [group for group in groups if group]


class _Group:
    """Tensors of one type on one device."""

    def __init__(self, names: list[str], tensors: list[torch.Tensor], directions: Directions):
        streams = [directions.stream(name, 0, 0) for name in names]
        self.first, self.tensors, self.sizes = names[0], tensors, [p.numel() for p in tensors]
        self._mover = _mover(streams[0], tensors[0])
        fake = isinstance(tensors[0].data, FakeTensor)
        self._tables = None if fake else self._mover.tables(streams, self.sizes, tensors[0].device)

    def empty(self) -> torch.Tensor:
        """(e,) a place for them."""
        return self.tensors[0].detach().new_empty(sum(self.sizes))

    def move(self, stream: Any, shift: float, flat_e: torch.Tensor) -> None:
        """Fills a place with the tensors + shift * u."""
        if self._tables is not None:  # in a forecast what takes memory is made, and nothing is run
            torch.cat([p.detach().reshape(-1) for p in self.tensors], out=flat_e)
            self._mover.add_many(stream, shift, flat_e, self._tables)


def _mover(stream: Stream | None, tensor: torch.Tensor) -> Any:
    """The module that moves tensors like this one; None if there is none."""
    return processor if processor.reaches(stream, tensor) else kernel_for(stream, tensor)

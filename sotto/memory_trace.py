"""Runs real code on tensors without data, and writes down which bytes are alive at each operation.

Large tensors are fake (`torch._subclasses.FakeTensor`): they have a shape, a type and a device, and no memory. Small
tensors that depend on no weight (token ids, masks, counters) are real, so that questions about them have true answers.
A question about fake values, such as "is every norm finite?", is answered as for a batch in which all is well.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sotto.memory_answers import ENDS, VALUE, Answers, is_empty

aten: Any = torch.ops.aten

SMALL = 1 << 20
"""Elements up to which a tensor that depends on no fake one is real."""

PARTS = (
    "weights", "trainables", "gradients", "optimizer", "activations", "logits", "per_unit_terms", "noise",
)  # fmt: skip


@dataclass
class Allocation:
    """One storage: `size` bytes of a part, alive at the operations from `born` to `died`, both included."""

    part: str
    size: int
    born: int
    died: int | None = None


@dataclass(frozen=True)
class Segment:
    """Operations that ran one after another in one place: a forward pass, a run of autograd, an optimizer's update.

    Attributes:
      phase: what the program was doing.
      names_E: (E,) which operation each one is, as a number.
      sizes_E: (E,) bytes of each one's first result.
      bytes_PE: (P, E) bytes of each part of `PARTS` that were alive during each operation.
    """

    phase: str
    names_E: np.ndarray
    sizes_E: np.ndarray
    bytes_PE: np.ndarray

    def signature(self, sizes: bool) -> np.ndarray:
        """(E,) numbers that tell operations apart, by their names or also by what they give."""
        large_E = np.where(self.sizes_E > _LITTLE, self.sizes_E, 0)
        return self.names_E + 4096 * large_E if sizes else self.names_E

    def towards(self, other: Segment, times: float) -> Segment:
        """This segment, and `times` the difference of another one with the same operations."""
        bytes_PE = np.rint(self.bytes_PE + times * (other.bytes_PE - self.bytes_PE)).astype(np.int64)
        return Segment(self.phase, self.names_E, self.sizes_E, bytes_PE)


class NotAlike(Exception):
    """Two traces do not differ by repeated stretches alone, so nothing follows from them for a third."""


def extended(first: list[Segment], second: list[Segment], times: float, *, sizes: bool) -> list[Segment]:
    """What a program needs that is to `first` as `second` is, but `times` as much.

    `second` is `first` with more layers, or with more examples. Its operations are those of `first`, with stretches of
    them repeated more often. An operation before such a stretch, and one after it, then meets memory that grows
    linearly with the repetitions, and within the stretch the first or the last repetition meets most. So it is enough
    to follow the operations of the last repetition as counted from the end, and those before as counted from the start.

    Args:
      times: the difference of the wanted program from `first`, over that of `second`.
      sizes: whether results of operations that correspond have one size: with more layers they do.

    Returns:
      Segments that hold both kinds of operations; their largest value is the peak.

    Raises:
      NotAlike: `second` is not `first` with stretches repeated.
    """
    if [s.phase for s in first] == [s.phase for s in second]:
        pairs = [(i, i) for i in range(len(first))]
    else:  # one run of autograd for each unit
        numbers: dict[Any, int] = {}
        pairs = _pairs(*(np.array([numbers.setdefault(_key(s), len(numbers)) for s in x]) for x in (first, second)))
    made = []
    for i, j in pairs:
        a, b = first[i], second[j]
        ours, theirs = np.array(_pairs(a.signature(sizes), b.signature(sizes)), dtype=np.int64).reshape(-1, 2).T
        here_PE, there_PE = a.bytes_PE[:, ours], b.bytes_PE[:, theirs]
        here, there = (Segment(a.phase, a.names_E[ours], a.sizes_E[ours], x_PE) for x_PE in (here_PE, there_PE))
        made.append(here.towards(there, times))
    return made


def highest(segments: list[Segment]) -> list[Segment]:
    """The operation of each phase at which most is alive, as a segment of its own; phases in the order of `PARTS`."""
    made = []
    for phase in (p for p in PARTS if any(s.phase == p for s in segments)):
        most = max((s for s in segments if s.phase == phase), key=lambda s: s.bytes_PE.sum(0).max(initial=0))
        at = slice(when := int(most.bytes_PE.sum(0).argmax()), when + 1)
        made.append(Segment(phase, most.names_E[at], most.sizes_E[at], most.bytes_PE[:, at]))
    return made


def _key(segment: Segment) -> tuple[str, bytes]:
    return segment.phase, segment.names_E.tobytes()


def _pairs(first: np.ndarray, second: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of positions at which two sequences do the same, where the second repeats stretches once more."""
    pairs: list[tuple[int, int]] = []
    i = j = 0
    while i < len(first) or j < len(second):
        alike = _common(first[i:], second[j:])
        pairs += [(i + n, j + n) for n in range(alike)]
        i, j = i + alike, j + alike
        if i == len(first) and j == len(second):
            break
        found = (_repeated(first[i : i + ahead], second, j) for ahead in _AHEAD)
        more = next((n for n in found if n is not None), None)
        if more is None or more > i:
            raise NotAlike
        # The last repetition is followed from the end alone: it may run into what is not like it (a first layer).
        pairs = [pair for pair in pairs if pair[0] < i - more] + [(i - more + n, j + n) for n in range(more)]
        j += more
    return pairs


def _repeated(rest: np.ndarray, second: np.ndarray, at: int) -> int | None:
    """How long the stretch is that is repeated at a position, and after which `rest` follows; None if there is none."""
    ends = np.flatnonzero(second[at:] == rest[0]) if len(rest) else [len(second) - at]
    for more in (int(n) for n in ends if 0 < n <= at):
        follows = _common(rest, second[at + more :]) == len(rest)
        if follows and np.array_equal(second[at : at + more], second[at - more : at]):
            return more
    return None


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many elements two sequences share at their start."""
    count = min(len(first), len(second))
    differ = np.flatnonzero(first[:count] != second[:count])
    return int(differ[0]) if len(differ) else count


def pretend(model: nn.Module, fake: FakeTensorMode, device: torch.device) -> None:
    """Replaces a model's weights and buffers by fake ones on a device, in place. Zeros stay known as such.

    Those that are fake already are brought there.

    Models are built on the meta device, which takes a hundredth of the time; but there is no kernel to ask about.
    """
    device = FakeTensor(fake, torch.empty(0, device="meta"), device).fake_device  # cuda has a number from here on
    made: dict[torch.Tensor, Any] = {}  # by identity; it keeps the originals, so that no other one gets their identity

    def on_device(x: torch.Tensor) -> Any:
        if isinstance(x, FakeTensor) and x.fake_device == device:
            return x
        if x not in made:
            zero = getattr(x, VALUE, None) == 0 if is_empty(x) else not bool(x.any())
            shape = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            data: Any = FakeTensor(fake, shape, device)
            made[x] = nn.Parameter(data, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else data
            if zero:
                setattr(made[x], VALUE, 0)
        return made[x]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({n: on_device(x) for n, x in held.items() if x is not None})


_LITTLE = 4095
"""Bytes of results whose size tells nothing: such as one number for each parameter, however many there are."""
_AHEAD = (24, 12, 6, 3)
"""Operations that have to follow after a stretch for it to count as repeated; fewer where another stretch is near."""
_NUMBERS: dict[str, int] = {}


class Recorder(TorchDispatchMode):
    """While active, every new storage is written down. `phase` says what the program is doing.

    Attributes:
      phase: the part of the step; it decides which part a new storage belongs to.
      vocabulary: a tensor whose last dimension has this size holds logits; 0 if there are none.
    """

    def __init__(self, fake: FakeTensorMode, vocabulary: int = 0):
        super().__init__()
        self.fake, self.vocabulary = fake, vocabulary
        self.phase = "activations"
        self._place: Any = None
        self._events: list[int] = []
        self._sizes: list[int] = []
        self._starts: list[tuple[str, int]] = []
        self._known: dict[int, weakref.ref[Any]] = {}
        self._owner: dict[int, Allocation] = {}
        self._all: list[Allocation] = []
        self._answers = Answers()

    def assign(self, tensors: Any, part: str) -> None:
        """Says which part tensors belong to, from their first byte on. Unknown ones are alive from now on."""
        for x in pytree.tree_leaves(tensors):
            if isinstance(x, torch.Tensor):
                self._note(x, part)
                self._owner[x.untyped_storage()._cdata].part = part

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def mark(self) -> int:
        """The number of operations so far. A new segment begins here."""
        self._place = None
        return len(self._events)

    def segments(self, start: int, stop: int | None = None) -> list[Segment]:
        """What was alive at each operation between two marks."""
        count = len(self._events)
        delta_PE = np.zeros((len(PARTS), count + 1), dtype=np.int64)
        for a in self._all:
            row = PARTS.index(a.part)
            delta_PE[row, min(a.born, count)] += a.size
            delta_PE[row, count if a.died is None else a.died + 1] -= a.size
        bytes_PE, names_E = delta_PE.cumsum(1), np.array(self._events, dtype=np.int64)
        sizes_E = np.array(self._sizes, dtype=np.int64)
        ends = [at for _, at in self._starts[1:]] + [count]
        return [
            Segment(phase, names_E[at:end], sizes_E[at:end], bytes_PE[:, at:end])
            for (phase, at), end in zip(self._starts, ends, strict=True)
            if start <= at < (count if stop is None else stop)
        ]

    def _note(self, x: torch.Tensor, part: str) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        allocation = Allocation(part, storage.nbytes(), len(self._events))

        def gone(_: Any) -> None:
            allocation.died = len(self._events) - 1
            self._known.pop(key, None)
            self._owner.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self._owner[key] = allocation
        self._all.append(allocation)

    def _part(self, x: torch.Tensor) -> str:
        large = x.dim() > 1 and self.vocabulary and x.shape[-1] == self.vocabulary
        return "logits" if large and self.phase in ("activations", "per_unit_terms") else self.phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # a question about where, not an operation
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args, **kwargs)
        node = torch._C._current_autograd_node() is not None
        if (self.phase, node) != self._place:
            self._place = (self.phase, node)
            self._starts.append((self.phase, len(self._events)))
        out = self._run(func, args, kwargs)
        for x in pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._note(x, self._part(x))
        given = next((x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)), None)
        self._sizes.append(0 if given is None else given.numel() * given.itemsize)
        self._answers.note(func, args, out)
        self._events.append(_NUMBERS.setdefault(func._schema.name, len(_NUMBERS)))
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(is_empty(x) for x in tensors):
            return self._ask(func, args, kwargs)
        on_meta = str(kwargs.get("device")) == "meta"
        if not tensors and not on_meta and _elements(func, args) > SMALL:
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _ask(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation on fake tensors; where the result depends on values, it is answered from what is known."""
        first: Any = args[0] if args else None
        if func is aten._local_scalar_dense.default:
            known = self._answers.of(first)
            value = 0 if known is None else known
            return (
                bool(value) if first.dtype is torch.bool else float(value) if first.is_floating_point() else int(value)
            )
        if func in (aten.equal.default, aten.allclose.default):
            return True
        if func is aten._to_copy.default and first.is_meta:  # there is nothing to bring to another device
            kwargs = {**kwargs, "device": None}
        if func is aten.nonzero.default:
            rows = 0 if self._answers.of(first) is False else first.numel()
            return first.new_zeros((rows, first.dim()), dtype=torch.long)
        if func in (aten._unique2.default, aten.unique_dim.default):
            flat = first.flatten()
            return flat.clone(), torch.zeros_like(first, dtype=torch.long), torch.zeros_like(flat, dtype=torch.long)
        if func is aten.index.Tensor and any(i is not None and i.dtype is torch.bool for i in args[1]):
            indices = [self._positions(i) if i is not None and i.dtype is torch.bool else [i] for i in args[1]]
            return func(first, [i for group in indices for i in group])
        return func(*args, **kwargs)

    def _positions(self, mask: torch.Tensor) -> list[torch.Tensor]:
        if not is_empty(mask):
            return list(torch.nonzero(mask).unbind(1))
        rows = 0 if self._answers.of(mask) is False else mask.numel()
        rows = len(mask) if hasattr(mask, ENDS) else rows
        return list(mask.new_zeros((rows, mask.dim()), dtype=torch.long).unbind(1))


def _elements(func: Any, args: Any) -> int:
    """How many elements a function without tensor arguments makes, read from its size arguments."""
    if args and isinstance(args[0], list | tuple):
        return int(np.prod(args[0], dtype=np.int64))
    if func._schema.name == "aten::arange":
        return int(max((x for x in args if isinstance(x, int | float)), default=0))
    return 0

"""One forward pass through coupled layers, and the way back: activations are computed again, not kept.

The graph of a layer is built as ever, but each tensor that autograd would save is replaced by a place in a list. When
the backward pass asks for one, the layer's input is recovered from what comes after it, the layer is run again, and its
tensors are handed out. So everything that works on an ordinary graph (hooks, several backward passes, engines that
intercept operations) works on this one, and each block of activations lives only while its layer's turn lasts.

Shape legend: streams, inputs and outputs of layers are (B, T, d).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch

from sotto.errors import SottoError
from sotto.models import stack
from sotto.models.reversible_streams import Streams

BOUND = 1e-3
"""Largest relative error of recovered streams, measured wherever they pass a stored pair."""
Pair = tuple[torch.Tensor, torch.Tensor]


class Layer:
    """One run of one layer, so that it can be repeated: same arguments, same random numbers, same autocast.

    Only the graph holds it. So what is kept for a layer is freed as soon as a backward pass that does not retain the
    graph has gone through the layer.

    Attributes:
      lost: what the streams' arithmetic needs to undo this layer's step.
      input: of the layer, where inputs are stored.
      before: the embeddings, for the first layer: both streams as they began.
      after: both streams after this layer's step, for the last layer and at anchors.
      values: what autograd asked for and has not fetched yet, by place.
    """

    def __init__(self, run: Run, index: int, forward: stack.Forward, arguments: tuple[Any, Any], x: torch.Tensor):
        self.run, self.index, self.forward = run, index, forward
        self.arguments = stack.with_hidden(*arguments, None)
        self.needs_grad, self.device = x.requires_grad, x.device
        kind = x.device.type
        self.autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        self.random = torch.get_rng_state()
        self.random_cuda = torch.cuda.get_rng_state(x.device) if kind == "cuda" else None
        self.count = 0
        self.values: dict[int, torch.Tensor] = {}
        self.lost: torch.Tensor | None = None
        self.input: torch.Tensor | None = None
        self.before: torch.Tensor | None = None
        self.after: Pair | None = None

    def first_time(self, x: torch.Tensor) -> Any:
        """Runs the layer. Nothing that autograd saves is kept."""
        with torch.autograd.graph.saved_tensors_hooks(self._place, _fetch):
            args, kwargs = stack.with_hidden(*self.arguments, x)
            return self.forward(*args, **kwargs)

    def again(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the layer once more on the recovered input, keeps what autograd saves, and returns the output."""
        found: list[torch.Tensor] = []
        with (
            torch.enable_grad(),
            self._as_before(),
            torch.autograd.graph.saved_tensors_hooks(lambda saved: found.append(saved.detach()), _never),
        ):
            args, kwargs = stack.with_hidden(*self.arguments, x.detach().requires_grad_(self.needs_grad))
            y = stack.first(self.forward(*args, **kwargs)).detach()
        if len(found) != self.count:
            raise SottoError(
                "SOT347", what=f"layer {self.index} saved {len(found)} tensors when run again, and {self.count} before",
                where="the backward pass of a reversible network",
                why="its activations are those of another computation, so the gradients would be wrong",
                fix="leave the model's mode and its modules alone between forward and backward",
            )  # fmt: skip
        self.values = dict(enumerate(found))
        return y

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        devices = [self.device] if self.random_cuda is not None else []
        with torch.random.fork_rng(devices=devices), torch.autocast(self.device.type, **self.autocast):
            torch.set_rng_state(self.random)
            if self.random_cuda is not None:
                torch.cuda.set_rng_state(self.random_cuda, self.device)
            yield

    def _place(self, saved: torch.Tensor) -> tuple[Layer, int]:
        self.count += 1
        return self, self.count - 1

    def value(self, place: int) -> torch.Tensor:
        if place not in self.values:
            self.run.run_again(self.index)
        return self.values.pop(place)


def _fetch(place: tuple[Layer, int]) -> torch.Tensor:
    layer, index = place
    return layer.value(index)


def _never(_: Any) -> NoReturn:
    raise AssertionError("the graph of a repeated run is not used")


class Run:
    """The streams of one forward pass.

    Layer n reads stream 1 - n % 2 and writes stream n % 2.

    Attributes:
      carriers: for each stream, what the model sees of it, in the model's own type and with its graph.
      raw: both streams after the last layer that ran.
      recovered, position: both streams before layer `position`, while a backward pass is under way.
      inversion_error: the largest found so far. A private value: it depends on the examples.
    """

    def __init__(self, streams: Streams | None, anchor_every: int | None, x: torch.Tensor):
        """`streams`: None stores each layer's input and leaves the model's function as it is."""
        self.streams, self.anchor_every, self.dtype = streams, anchor_every, x.dtype
        start_x = x if streams is None else _Enter.apply(x, streams)
        self.carriers: list[Any] = [start_x, start_x]
        self.layers: WeakValueDictionary[int, Layer] = WeakValueDictionary()
        self.top = -1
        self.position, self.recovered = -1, None
        self.inversion_error = 0.0
        self.raw: Pair | None = None
        if streams is not None:
            start = streams.enter(x.detach())
            self.raw = start, start

    def layer(self, index: int, forward: stack.Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one layer and couples it. Returns what the layer returns, with the new stream as hidden states."""
        mine, other = index % 2, 1 - index % 2
        x = self.carriers[other]
        if index and stack.hidden_of(args, kwargs) is not x:
            raise _out_of_order(index)
        args, kwargs = stack.with_hidden(args, kwargs, x)
        layer = None
        if torch.is_grad_enabled():
            layer = self.layers[index] = Layer(self, index, forward, (args, kwargs), x)
            if self.streams is None:
                layer.input = x.detach()
            elif index == 0:
                layer.before = x.detach()
            out = layer.first_time(x)
        else:
            out = forward(*args, **kwargs)
        y = stack.first(out)
        if self.streams is not None:
            y = _Couple.apply(self.carriers[mine], x, y, self, index)
            if layer is not None and self.anchor_every and (index + 1) % self.anchor_every == 0:
                layer.after = self.raw
        self.carriers[mine], self.top = y, index
        return stack.with_first(out, y)  # type: ignore[arg-type]

    def close(self) -> None:
        """After the last layer. What has a graph is let go: the graph refers to this object, and would never go."""
        self.carriers = []
        if (layer := self.layers.get(self.top)) is not None and self.raw is not None:
            layer.after = self.raw
        self.raw = None

    def advance(self, index: int, y: torch.Tensor) -> torch.Tensor:
        """One step of the streams. Returns the new one as the model sees it."""
        assert self.streams is not None
        assert self.raw is not None
        mine, other = self.raw[index % 2], self.raw[1 - index % 2]
        new, lost = self.streams.step(mine, other, y)
        if (layer := self.layers.get(index)) is not None:
            layer.lost = lost
        self.raw = (new, other) if index % 2 == 0 else (other, new)
        return self.streams.read(new, self.dtype)

    def run_again(self, index: int) -> None:
        """Recovers the input of a layer and runs the layer on it, so that its `values` are there."""
        if self.streams is None:
            layer = self.layers[index]
            assert layer.input is not None
            layer.again(layer.input)
            return
        if self.position <= index:  # a backward pass begins, the first or another one
            self.position, self.recovered = self.top + 1, None
        while self.position > index:
            self._step_back(keep=self.position == index + 1)

    def _step_back(self, keep: bool) -> None:
        assert self.streams is not None
        index = self.position - 1
        layer, above = self.layers[index], self.layers.get(index + 1)
        if above is not None:
            above.values = {}
        if layer.after is not None:
            if self.recovered is not None:
                self._measure(self.position, layer.after)
            self.recovered = layer.after
        assert self.recovered is not None
        new, v = self.recovered[index % 2], self.recovered[1 - index % 2]
        y = layer.again(self.streams.read(v, self.dtype))
        if not keep:
            layer.values = {}
        u = self.streams.undo(new, v, y, layer.lost)
        self.position, self.recovered = index, (u, v) if index % 2 == 0 else (v, u)
        if layer.before is not None:
            start = self.streams.enter(layer.before)
            self._measure(index, (start, start))
            self.position, self.recovered = -1, None

    def _measure(self, index: int, exact: Pair) -> None:
        assert self.streams is not None
        assert self.recovered is not None
        error = max(self.streams.error(a, b) for a, b in zip(self.recovered, exact, strict=True))
        self.inversion_error = max(self.inversion_error, error)
        if not error <= BOUND:
            raise SottoError(
                "SOT346", what=f"recovered activations are off by {error:.1e} of the largest value at layer {index}",
                where="the backward pass of a reversible network",
                why=f"more than {BOUND:g} would make the gradients wrong, so nothing was released",
                fix="use streams: fixed, or anchors at fewer layers, or streams: stored",
            )  # fmt: skip


class _Enter(torch.autograd.Function):
    """What the streams hold of the embeddings; the gradient takes their rounding for the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, streams: Streams) -> torch.Tensor:
        return streams.read(streams.enter(x), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        return grads[0], None


class _Couple(torch.autograd.Function):
    """`y + factor * (u - v)`, computed on the raw streams; the gradient takes their rounding for the identity."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, v: torch.Tensor, y: torch.Tensor, run: Run, index: int) -> torch.Tensor:
        ctx.factor, ctx.dtype = run.streams.factor, y.dtype  # type: ignore[union-attr]
        return run.advance(index, y)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        g = grads[0]
        return ctx.factor * g, -ctx.factor * g, g.to(ctx.dtype), None, None


def _out_of_order(index: int) -> SottoError:
    return SottoError(
        "SOT340",
        what=f"Layer {index} did not get what the layer before it gave.",
        where="the forward pass of a reversible network",
        why="The streams are coupled from layer to layer; what happens between two of them would be lost.",
        fix="Set method.train: lora for this model.",
    )

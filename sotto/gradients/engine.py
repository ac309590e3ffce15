"""`attach`: per-unit clipped gradients for any PyTorch model, in the user's own loop.

    engine = sotto.attach(model, clip_norm=1.0)
    losses = per_example_loss(model(**batch))     # shape (B,)
    total = engine.backward(losses, units=None)   # ClippedSum
    engine.detach()

The model is not wrapped, renamed or edited: while attached, modules that own trainable parameters have an instance
attribute `forward`; `detach` removes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils import _pytree as pytree

from sotto.errors import SottoError, did_you_mean
from sotto.gradients import book_keeping, ghost, layerwise, per_example, sites
from sotto.gradients.base import ClippedSum
from sotto.gradients.clipping import CLIPPINGS, Clipping
from sotto.gradients.rows import Rows
from sotto.gradients.rules import contain
from sotto.gradients.rules.generic import COUPLING
from sotto.gradients.taps import Book, Phase, Site, State

Algorithm = Literal["auto", "per_example", "ghost", "book_keeping", "layerwise"]
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ALGORITHMS = {
    "per_example": per_example.run, "ghost": ghost.run, "book_keeping": book_keeping.run, "layerwise": layerwise.run,
}  # fmt: skip


@dataclass(frozen=True)
class ModuleReport:
    """How one module's trainable parameters are handled. `slow` ones cost a pass through the whole model per unit."""

    path: str
    parameters: tuple[str, ...]
    rule: str
    slow: bool
    reason: str = ""


class Engine:
    """Clipped sums of per-unit gradients of one model. Make it with `attach`."""

    def __init__(self, model: nn.Module, clipping: Clipping, algorithm: str):
        self.model, self.clipping, self.algorithm = model, clipping, algorithm
        self.state = State()
        self.sites: dict[str, Site] = {}
        self.slow: dict[str, str] = {}
        """Names of parameters on the slow path, with the reason."""
        self.tried: dict[str, str] = {}
        """Where a parameter was last tried to be run again: the path of a module."""
        self.hopeless: set[str] = set()
        """Names of parameters that stay on the slow path."""
        self.verified: Any = None
        """The arrangement that `self_check.verify` has last found right."""
        self.tapped: set[str] = set()
        """Names of parameters that have come through a tapped operation."""
        self.calls = 0
        self._bad_inputs: list[torch.Tensor] = []
        self._parameters: dict[str, nn.Parameter] | None = None
        self._attached = False
        self._attach()

    def _attach(self) -> None:
        for path, module in self.model.named_modules():
            if isinstance(module, COUPLING):
                raise SottoError(
                    "SOT603", what="the model has batch normalisation", where=f"module '{path}'",
                    why="its statistics mix the examples of a batch, so a gradient per unit does not exist",
                    fix="replace it with group or layer normalisation",
                )  # fmt: skip
        self._refresh_names()
        self.state.constants = {id(t) for t in (*self.model.parameters(), *self.model.buffers())}
        self.sites = sites.make(self)
        for site in self.sites.values():  # only now, so that a refusal leaves the model as it was
            sites.place(site)
        # What is counted in each call cannot be compiled, so a compiled model runs as it is written while attached.
        self._forward = self.model.__dict__.get("forward")
        self.model.__dict__["forward"] = torch.compiler.disable(self.model.forward)
        enter: Any = torch.compiler.disable(self._enter)
        leave: Any = torch.compiler.disable(self._leave)
        self._hooks = [
            self.model.register_forward_pre_hook(enter, with_kwargs=True),
            self.model.register_forward_hook(leave, always_call=True),
        ]
        self._attached = True

    def _refresh_names(self) -> None:
        parameters = self.parameters
        if not parameters:
            raise SottoError("SOT604", what="the model has no trainable parameter", where="attach",
                             why="there is nothing to take gradients of", fix="set requires_grad on some")  # fmt: skip
        for name, parameter in parameters.items():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                raise SottoError(
                    "SOT605", what=f"the trainable parameter is stored in {parameter.dtype}", where=f"'{name}'",
                    why="private updates are small beside the noise and vanish in half precision",
                    fix="keep trainable parameters in float32 and use torch.autocast for the arithmetic",
                )  # fmt: skip
        self.state.names = {id(p): name for name, p in parameters.items()}
        self.group_of = self.clipping.group_of(parameters)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; tied ones once, under their first name."""
        if self._parameters is not None:
            return self._parameters
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Notes the shapes of the model's inputs: they tell which tensors inside have a batch dimension."""
        leaves, _ = pytree.tree_flatten((kwargs, args))
        tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.dim() > 0]
        main = [kwargs[k] for k in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(k), torch.Tensor)]
        batched = [t for t in tensors if t.dim() > 1 and t.shape[0] > 1]
        first = next(iter([*main, *batched, *tensors]), None)
        self.state.batch_size = 0 if first is None or first.dim() == 0 else first.shape[0]
        # (B, T) or (B, T, d); a tensor of ids with three dimensions has choices or frames, not tokens, in the second.
        wanted = [t for t in tensors if t.dim() <= 2 or t.is_floating_point()]
        self.state.input_shapes = {tuple(t.shape[:2]) for t in wanted}
        self.state.inside = True
        self._bad_inputs = []
        if self._slow_somewhere():
            args, kwargs, self._bad_inputs = contain.cleaned(args, kwargs)
        return args, kwargs

    def _leave(self, module: nn.Module, args: Any, out: Any) -> Any:
        self.state.inside = False
        if not self._slow_somewhere():
            return None
        out = contain.spoiled(out, self._bad_inputs, whole_rows=True) if self._bad_inputs else out
        contain.guard(out, self.state)
        return out

    def _slow_somewhere(self) -> bool:
        """Whether one example's infinities could reach other units, so that they must not enter the model."""
        slow = bool(self.slow) or self.algorithm == "per_example"
        slow = slow or any(site.rule == "rerun" and not site.confirmed for site in self.sites.values())
        return slow and torch.is_grad_enabled() and not self.state.paused

    def backward(self, losses: torch.Tensor, units: torch.Tensor | None = None) -> ClippedSum:
        """Replaces `losses.sum().backward()`.

        Args:
          losses: (B,) one loss per example, with its graph. It must not depend on other examples.
          units: (B,) integers that group examples of one privacy unit, whose summed gradient is clipped as one vector.
            Without it every example is a unit.

        Returns:
          The clipped sum. Parameters' `.grad` is neither read nor written.

        Raises:
          SottoError: the engine is detached, `losses` or `units` has the wrong shape, or examples
            influence one another.
        """
        self._check_call(losses, units)
        self._refresh_names()
        self._parameters = self.parameters  # a pass asks for them several times
        rows = Rows.build(len(losses), units, losses.device)
        try:
            # Saved activations come with their graph: what is computed from them here must not keep it alive.
            with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
                total = ALGORITHMS[self.algorithm](self, losses, rows)
                sites.promote(self)
                return total
        finally:
            self._parameters = None
            self.state.forget()

    def _check_call(self, losses: torch.Tensor, units: torch.Tensor | None) -> None:
        where = "engine.backward"
        if not self._attached:
            raise SottoError("SOT606", what="the engine is detached", where=where,
                             why="the model's operations are no longer tapped", fix="attach again")  # fmt: skip
        if not isinstance(losses, torch.Tensor):
            raise SottoError("SOT607", what=f"losses is a {type(losses).__name__}", where=where,
                             why="it must be a tensor with its graph", fix="pass the tensor of losses")  # fmt: skip
        if losses.dim() != 1 or not losses.is_floating_point() or len(losses) == 0 or not losses.requires_grad:
            graph = "" if losses.requires_grad else " without a graph"
            raise SottoError(
                "SOT607", what=f"losses has shape {tuple(losses.shape)}{graph}", where=where,
                why="per-unit clipping needs one loss for each example, shape (B,), not a mean over the batch",
                fix="use reduction='none' and average over each example's own tokens; "
                "for an empty batch use ClippedSum.zeros",
            )  # fmt: skip
        if units is None:
            return
        described = f"{units.dtype} of shape {tuple(units.shape)}" if isinstance(units, torch.Tensor) else type(units)
        integer = isinstance(units, torch.Tensor) and units.dtype in INTEGERS
        if not integer or units.shape != losses.shape:
            raise SottoError("SOT608", what=f"units is {described}", where=where,
                             why=f"it must hold one integer per loss, shape {tuple(losses.shape)}",
                             fix="pass the unit index of each example")  # fmt: skip

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Sets what tapped operations do in the backward passes inside."""
        before, self.state.phase, self.state.in_backward = self.state.phase, phase, True
        try:
            yield
        finally:
            self.state.phase, self.state.in_backward = before, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model runs exactly as if nothing were attached."""
        self.state.paused = True
        try:
            yield
        finally:
            self.state.paused = False

    @property
    def num_groups(self) -> int:
        """How many groups of parameters are clipped on their own."""
        return max(self.group_of.values()) + 1

    def zeros(self) -> ClippedSum:
        """The clipped sum of an empty batch."""
        return ClippedSum.zeros(self.parameters, self.clipping.sensitivity, self.num_groups)

    def no_norms(self, rows: Rows) -> torch.Tensor:
        """(U, G) zeros, for squared norms to be added to."""
        return torch.zeros(rows.num_units, self.num_groups, dtype=torch.float64, device=rows.unit_of_B.device)

    def book(self, rows: Rows, *, keep: bool) -> Callable[[set[str]], Book]:
        """Makes empty books for `passes.record`. `keep`: pieces for the weighted sum, or only their norms."""
        return lambda shared: Book(rows, keep, shared, self.group_of, self.no_norms(rows))

    @property
    def arrangement(self) -> Any:
        """Which site handles which parameters, and which none does. It changes when a rule turns out not to fit."""
        return frozenset((path, site.rule, *site.roles()) for path, site in self.sites.items()), frozenset(self.slow)

    def report(self) -> list[ModuleReport]:
        """Which module runs on which rule. What is not on a fast one is known after the first backward passes."""
        found = []
        again = {name: path for path, site in self.sites.items() if site.rule == "rerun" for name in site.roles()}
        for path, module in self.model.named_modules():
            ids = [id(p) for p in module.parameters(recurse=False) if p.requires_grad]
            if not ids:
                continue
            names = tuple(self.state.names[i] for i in ids if i in self.state.names)
            site = self.sites.get(path)
            if around := {again[n] for n in names if n in again and n not in self.slow}:
                reason = f"run again one unit at a time, with all of '{min(around) or 'the model'}'"
                found.append(ModuleReport(path, names, "rerun", "" in around, reason))
                continue
            if site is None and not any(n in self.slow for n in names):
                continue  # reported with the module that uses them
            reasons = [self.slow[n] for n in names if n in self.slow]
            slow = bool(reasons) or site is None or site.declined is not None or site.rule == "slow"
            reason = (site.declined if site else None) or (reasons[0] if reasons else "")
            if slow and not reason:
                reason = sites.NO_RULE
            found.append(ModuleReport(path, names, "slow" if slow or site is None else site.rule, slow, reason))
        return found

    def detach(self) -> None:
        """Leaves the model as it was: same class, hooks, `state_dict` keys and `requires_grad`."""
        if not self._attached:
            return
        del self.model.__dict__["forward"]
        if self._forward is not None:
            self.model.__dict__["forward"] = self._forward
        for site in self.sites.values():
            sites.restore(site)
        for hook in self._hooks:
            hook.remove()
        self._attached = False


def attach(
    model: nn.Module,
    *,
    clip_norm: float = 1.0,
    algorithm: Algorithm = "auto",
    clipping: Literal["flat", "automatic", "adaptive"] | Clipping = "flat",
) -> Engine:
    """Prepares a model for per-unit clipped gradients.

    Args:
      model: any module. It stays as it is; trainable parameters are those with `requires_grad`. One that
        `torch.compile` made may be given, but is not compiled while it is attached.
      clip_norm: L2 bound of one unit's contribution; the sensitivity of every `ClippedSum`.
      algorithm: `per_example` (one backward pass per unit: the oracle), `ghost` (norms, then a second backward pass:
        least memory), `book_keeping` (one backward pass), or `auto`: all give the same numbers. `layerwise` clips each
        layer to `clip_norm / sqrt(layers)` within one backward pass, and keeps nothing: least time and memory, and
        another sum of the same sensitivity.
      clipping: `flat`, `automatic` or `adaptive`; see `sotto.gradients.clipping`. A clipping that is layer-wise takes
        the algorithm `layerwise` (`auto`), or `per_example` and `book_keeping` to compare with.

    Raises:
      SottoError: unknown algorithm or clipping, clip_norm not positive, batch norm in the model, nothing trainable.
    """
    if algorithm != "auto" and algorithm not in ALGORITHMS:
        raise SottoError("SOT600", what=f"unknown algorithm '{algorithm}'.{did_you_mean(algorithm, ALGORITHMS)}",
                         where="attach", why="the way gradients are computed must be known",
                         fix="one of auto, " + ", ".join(ALGORITHMS))  # fmt: skip
    resolved = _clipping(clipping, clip_norm, algorithm == "layerwise")
    layerwise = bool(getattr(resolved, "layerwise", False))
    if layerwise != (algorithm == "layerwise") and algorithm not in ("auto", "per_example", "book_keeping"):
        raise SottoError("SOT600", what=f"algorithm '{algorithm}' with {resolved}", where="attach",
                         why="ghost clipping has one factor per unit for the whole gradient, layer-wise clipping has "
                         "one for each layer", fix="give both or neither: algorithm='layerwise' and a layer-wise "
                         "clipping")  # fmt: skip
    if algorithm == "auto":
        # One pass, and norms of large layers are never instantiated: the better default on every model measured.
        algorithm = "layerwise" if layerwise else "book_keeping"
    return Engine(model._orig_mod if isinstance(model, OptimizedModule) else model, resolved, algorithm)


def _clipping(clipping: str | Clipping, clip_norm: float, layerwise: bool) -> Clipping:
    """Resolves a name, and refuses a clipping that bounds nothing."""
    if isinstance(clipping, str):
        if clipping not in CLIPPINGS:
            raise SottoError("SOT600", what=f"unknown clipping '{clipping}'.{did_you_mean(clipping, CLIPPINGS)}",
                             where="attach", why="the sensitivity follows from it",
                             fix="one of " + ", ".join(CLIPPINGS))  # fmt: skip
        number = isinstance(clip_norm, int | float) and not isinstance(clip_norm, bool)
        if not (number and 0 < clip_norm < float("inf")):
            raise SottoError("SOT600", what=f"clip_norm is {clip_norm!r}", where="attach",
                             why="it bounds a unit's influence and must be a positive number",
                             fix="1.0 is a good start")  # fmt: skip
        return CLIPPINGS[clipping](clip_norm, layerwise)
    if not clipping.sensitivity > 0:
        raise SottoError("SOT600", what=f"{clipping} has sensitivity {clipping.sensitivity}", where="attach",
                         why="it bounds a unit's influence and must be a positive number",
                         fix="give it a positive clip_norm")  # fmt: skip
    return clipping

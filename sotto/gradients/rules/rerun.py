"""Any module, also one with modules inside: run it again, one unit at a time, on what went in.

State-space mixers, fused experts, routers, tables of relative positions: what enters and what leaves has a row for each
example, though nothing in between may. In the backward pass the module runs again on each unit's rows alone, and plain
autograd takes the gradient of the parameters that it *covers* against the gradient of what left: one more forward and
backward pass of this module over the batch, in small parts. The weighted sum takes another one, over all rows at once,
unless the gradients of the units are small enough to be kept.

Nothing is taken on trust. On the first batch the sum over the units has to be the batch's gradient, so that no way out
of the module is missed; and each row alone has to give what it gave inside the batch, then and in every later step.

Shape legend: see rows.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sotto.gradients.pieces import wide
from sotto.gradients.rules.call import TENSOR, Call, Layout, Unfit, by_row, layout_of
from sotto.gradients.rules.contain import cleaned, spoiled, untapped
from sotto.gradients.taps import Phase, Site, State, autocast_dtype

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class RerunSite(Site):
    """A module that is run again for the sake of some parameters, its own or those of modules inside.

    Attributes:
      covered: name -> parameter.
      careful: the last forward pass was of an unconfirmed site.
      balance: name -> what arrived in the graph minus what the rows gave one by one; `sizes`: the norm of the former.
      known: structure of the inputs -> their layouts, as checked.
      narrow: its arithmetic is in half precision.
    """

    def __init__(self, state: State, path: str, module: nn.Module, covered: dict[str, nn.Parameter]):
        super().__init__(state, path, module, "rerun", tap)  # type: ignore[arg-type]
        self.covered = covered
        self.anchored = False  # what looks like rows of examples may be something else of the same number
        self.careful, self.narrow = True, False
        self.balance: dict[str, torch.Tensor] = {}
        self.sizes: dict[str, float] = {}
        self.known: dict[Any, list[Layout]] = {}
        name_of = {id(p): name for name, p in covered.items()}
        self._holders = [
            (inner, role, name_of[id(p)])
            for inner in module.modules()
            for role, p in inner._parameters.items()
            if id(p) in name_of
        ]

    def roles(self) -> list[str]:
        return list(self.covered)

    def own(self) -> list[nn.Parameter]:
        return [p for p in self.covered.values() if p.requires_grad]

    def name(self, role: str) -> str | None:
        parameter = self.covered.get(role)
        return self.state.names.get(id(parameter)) if parameter is not None and parameter.requires_grad else None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, what arrives at the covered parameters is not their gradient.

        They stay in the graph, or a checkpointed part would save other tensors when it is computed again.
        """
        stand_in = {name: _Watch.apply(p, self, name) for name, p in self.covered.items()}
        for inner, role, name in self._holders:
            inner._parameters[role] = stand_in[name]  # type: ignore[assignment]
        try:
            yield
        finally:
            for inner, role, name in self._holders:
                inner._parameters[role] = self.covered[name]

    def run_alone(self, args: Any, kwargs: Any) -> Any:
        """Runs the module as if nothing were attached."""
        paused, self.state.paused = self.state.paused, True
        try:
            return self.original(*args, **kwargs)
        finally:
            self.state.paused = paused

    def conclude(self, num_rows: int) -> None:
        for name, rest in self.balance.items():
            allowed = (5e-2 if self.narrow else 1e-3) * self.sizes.get(name, 0.0) + 1e-12
            if self.declined is None and not float(rest.norm()) <= allowed:
                self.decline("its parameters have an effect beyond what it returns")
        self.balance, self.sizes = {}, {}
        super().conclude(num_rows)


def tap(site: RerunSite) -> Any:
    def forward(*given: Any, **named: Any) -> Any:
        if not site.active():
            return untapped(site, *given, **named)
        args, kwargs, bad = given, named, list[torch.Tensor]()
        if not site.state.in_backward:  # a checkpointed block must recompute what it computed
            site.careful = not site.confirmed
        if site.careful:
            args, kwargs, bad = cleaned(given, named)
        try:
            if not site.state.in_backward:
                _require_fit(site, args, kwargs)
        except Unfit as unfit:
            site.decline(str(unfit))
            return untapped(site, *given, **named)
        with site.watched():
            out = site.original(*args, **kwargs)
        try:
            return spoiled(_tapped(site, args, kwargs, out), bad, whole_rows=True)
        except Unfit as unfit:  # it takes what it always took, and returns something else
            site.decline(str(unfit))
            return untapped(site, *given, **named)

    return forward


def _require_fit(site: RerunSite, args: Any, kwargs: Any) -> None:
    """Runs the whole batch, and the first and the last example alone, unless these inputs look like checked ones."""
    if not site.state.inside or site.state.batch_size == 0:
        raise Unfit("it is called outside the model's own forward, so its rows are not known")
    for leaf in pytree.tree_leaves((args, kwargs)):
        if not isinstance(leaf, (torch.Tensor, *PLAIN)):
            raise Unfit(f"it is given a {type(leaf).__name__}")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    layouts = [layout_of(x, site.state) for x in tensors]
    if all(layout is None for layout in layouts):
        raise Unfit("what enters it has no row for each example")
    key, size = (str(spec), tuple(x.dim() for x in tensors)), site.state.batch_size
    if size < 2 or (site.confirmed and site.known.get(key) == layouts):
        return
    devices = {x.device for x in tensors if x.is_cuda}
    # With a graph, because what a module remembers from its trial (the cache of a parametrisation) is used afterwards;
    # and with hooks that hide the trial from an enclosing checkpoint.
    kept = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.random.fork_rng(devices), kept:
        _try_it(site, leaves, spec, size)
    site.known[key] = layouts


def _try_it(site: RerunSite, leaves: list[Any], spec: Any, size: int) -> None:
    copies = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    tensors = [leaf for leaf in copies if isinstance(leaf, torch.Tensor)]
    before = [x._version for x in tensors]
    args, kwargs = pytree.tree_unflatten(copies, spec)
    call = _describe(site, leaves, spec, site.run_alone(args, kwargs))
    call.tensors = tensors
    if before != [x._version for x in tensors]:
        raise Unfit("it writes into what it is given")
    for rows in ([0], [size - 1], [0, size - 1]):  # two at once, because a tensor with one row fits any number
        index = torch.tensor(rows, device=tensors[0].device)
        if not call.agrees(call.again(index), index):
            raise Unfit("its output for one example depends on the others")


def _describe(site: RerunSite, leaves: list[Any], spec: Any, out: Any) -> Call:
    """The call, without its inputs."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    found = pytree.tree_leaves(out)
    at = [i for i, x in enumerate(found) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() > 0]
    outs = [found[i].detach() for i in at]
    layouts, out_layouts = ([layout_of(x, site.state) for x in group] for group in (tensors, outs))
    if not at or None in out_layouts:
        raise Unfit("what it returns has no row for each example")
    first = next(x for x, layout in zip(tensors, layouts, strict=True) if layout is not None)
    site.narrow = autocast_dtype(first) is not None or first.dtype in (torch.bfloat16, torch.float16)
    arguments = [TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    half = autocast_dtype(first)
    return Call(site, spec, arguments, layouts, at, out_layouts, half, outs=outs)


def _tapped(site: RerunSite, args: Any, kwargs: Any, out: Any) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    found, out_spec = pytree.tree_flatten(out)
    call = _describe(site, leaves, spec, out)
    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    site.entering(by_row(call.outs[0], call.out_layouts[0]), *site.covered)
    saved, call.outs = (tensors, call.outs), []
    tapped = _Tap.apply(call, saved, *site.covered.values(), *(found[i] for i in call.at))
    for i, x in zip(call.at, tapped, strict=True):  # type: ignore[arg-type]
        found[i] = x
    return pytree.tree_unflatten(found, out_spec)


class _Watch(torch.autograd.Function):
    """A parameter inside its module: notes the gradient that arrives, and lets it pass only when the module is not
    tapped after all."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, site: RerunSite, name: str):
        ctx.site, ctx.name = site, name
        return parameter.detach().view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        site: RerunSite = ctx.site
        if site.declined is not None:
            return grads[0], None, None
        if site.state.phase is Phase.PROBE and not site.confirmed:
            site.balance[ctx.name] = site.balance.get(ctx.name, 0) + wide(grads[0])
            site.sizes[ctx.name] = site.sizes.get(ctx.name, 0.0) + float(grads[0].norm())
        return None, None, None


class _Tap(torch.autograd.Function):
    """Identity on what leaves a module; hands its gradient to the site."""

    @staticmethod
    def forward(ctx: Any, call: Call, saved: tuple[list[torch.Tensor], list[torch.Tensor]], *tensors: torch.Tensor):
        ctx.call, ctx.inputs = call, len(saved[0])
        ctx.save_for_backward(*saved[0], *saved[1])
        return tuple(x.clone() for x in tensors[len(call.site.covered) :])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        call, site = ctx.call, ctx.call.site
        saved = list(ctx.saved_tensors)
        grads = tuple(site.state.isolate(g) for g in grads)
        call = replace(call, tensors=saved[: ctx.inputs], outs=saved[ctx.inputs :], grads=list(grads))
        if site.state.phase is Phase.PROBE and site.declined is None and not site.confirmed:
            _balance(call)
        rows = [by_row(g, layout) for g, layout in zip(grads, call.out_layouts, strict=True)]
        several = len(rows) > 1 and site.state.phase is Phase.PROBE
        flat = [x.reshape(len(x), -1) for x in rows]
        g = torch.cat(flat, 1) if several else flat[0]
        own: dict[str, torch.Tensor] = {}
        if site.receive(g[..., None], call.pieces) and site.declined is None:
            bad_B = site.state.bad_B
            everyone = torch.ones(len(g), dtype=torch.bool, device=g.device) if bad_B is None else ~bad_B
            own = call.recorded(torch.nonzero(everyone).flatten())
        return None, None, *(own.get(name) for name in site.covered), *grads


def _balance(call: Call) -> None:
    """Takes what each row gives alone off what arrives at the watched parameters."""
    site = call.site
    try:
        for row in range(len(by_row(call.outs[0], call.out_layouts[0]))):
            for name, grad in call.gradients(torch.tensor([row], device=call.outs[0].device)).items():
                site.balance[name] = site.balance.get(name, 0) - grad
    except Unfit as unfit:
        site.decline(str(unfit))

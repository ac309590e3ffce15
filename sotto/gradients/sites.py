"""Which module is tapped by which rule, at first and after a rule has turned out not to fit.

A parameter whose rule does not fit is handed to the module that holds it, to be run again unit by unit
(`rules/rerun.py`), then to the module around that one, and so on up to the model itself. Only if the model as a whole
cannot be run one unit at a time do its gradients come from one backward pass through everything for each unit.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Any

from torch import nn

from sotto.errors import SottoError
from sotto.gradients.rules import contain, rule_for
from sotto.gradients.rules.rerun import RerunSite
from sotto.gradients.taps import Site

if TYPE_CHECKING:
    from sotto.gradients.engine import Engine

NO_RULE = "no rule for this module: its own backward pass, one unit at a time"


def make(engine: Engine) -> dict[str, Site]:
    """Returns a site for each module that owns trainable parameters; nothing is changed yet."""
    found: dict[str, Site] = {}
    ruled: set[int] = set()  # parameters of modules with a rule
    for path, module in engine.model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        if getattr(module.__dict__.get("forward"), "sotto_engine", False):
            raise SottoError("SOT600", what="another engine is attached to the model", where=f"module '{path}'",
                             why="two engines would take each other's operations for the model's own",
                             fix="call detach() on the other one first")  # fmt: skip
        if engine.algorithm == "per_example":
            found[path] = Site(engine.state, path, module, "slow", contain.tap)
            continue
        rule, tap = rule_for(module)
        if tap is None:
            names = {engine.state.names[id(p)]: p for p in own}
            engine.tried.update(dict.fromkeys(names, path))
            found[path] = RerunSite(engine.state, path, module, names)
        else:
            found[path] = Site(engine.state, path, module, rule, tap)
            ruled |= {id(p) for p in own}
    # A module without a rule may only hold a second name for a parameter that another module uses (the bias of a BERT
    # language head). If it used it as well, the gradient of that use would be found as any untapped one.
    idle = {p for p, site in found.items() if isinstance(site, RerunSite) and {*map(id, site.own())} <= ruled}
    return {path: site for path, site in found.items() if path not in idle}


def place(site: Site) -> None:
    """From here on the module runs what the site makes of it."""
    forward = site.make(site)
    forward.sotto_engine = True
    site.module.__dict__["forward"] = forward


def restore(site: Site) -> None:
    """Puts back what stood before: the class's forward, or an instance attribute of another library."""
    inherited = type(site.module).forward.__get__(site.module)
    site.module.__dict__.pop("forward", None)
    if site.original != inherited:
        site.module.__dict__["forward"] = site.original


def promote(engine: Engine) -> None:
    """Hands each parameter on the slow path to the next module that may be run again for it."""
    waiting = [name for name in engine.parameters if name in engine.slow and name not in engine.hopeless]
    if engine.algorithm == "per_example" or not waiting:
        return
    modules = dict(engine.model.named_modules())
    holders = _holders(modules)
    groups: dict[str, list[str]] = {}
    for name in waiting:
        tried = engine.tried.get(name)
        path = _common(holders[id(engine.parameters[name])]) if tried is None else _parent(tried)
        while path and (_is_taken(engine, path) or not _can_run(modules[path])):
            path = _parent(path) or ""
        if path is None:
            engine.hopeless.add(name)
            continue
        engine.tried[name] = path
        groups.setdefault(path, []).append(name)
    _remove(engine, {name for names in groups.values() for name in names})
    for path, names in groups.items():
        _cover(engine, path, modules[path], {name: engine.parameters[name] for name in names})
    for name in sorted(engine.hopeless):
        for path in holders[id(engine.parameters[name])] if name in engine.parameters else ():
            if path not in engine.sites:  # so that one example's infinities stay with it
                engine.sites[path] = Site(engine.state, path, modules[path], "slow", contain.tap)
                place(engine.sites[path])


def _cover(engine: Engine, path: str, module: nn.Module, names: dict[str, Any]) -> None:
    before = engine.sites.pop(path, None)
    if before is not None:
        restore(before)
        if isinstance(before, RerunSite):
            names = {**before.covered, **names}
    engine.sites[path] = RerunSite(engine.state, path, module, names)
    place(engine.sites[path])
    for name in names:
        engine.slow.pop(name, None)


def _remove(engine: Engine, names: set[str]) -> None:
    """Takes away sites that were declined, all of whose parameters go elsewhere now."""
    for path, site in list(engine.sites.items()):
        held = {name for role in site.roles() if (name := site.name(role)) is not None}
        if site.declined is not None and held <= names:
            restore(engine.sites.pop(path))


def _holders(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """id of a parameter -> paths of all modules that hold it."""
    found: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), []).append(path)
    return found


def _common(paths: list[str]) -> str:
    """The innermost module around all of them."""
    steps = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))


def _parent(path: str) -> str | None:
    return path.rpartition(".")[0] if path else None


def _is_taken(engine: Engine, path: str) -> bool:
    """Whether this very module has a rule of its own, or cannot be run again."""
    site = engine.sites.get(path)
    return site is not None and (site.declined is None) != isinstance(site, RerunSite)


def _can_run(module: nn.Module) -> bool:
    """A list of layers is a module, too, but is never called."""
    return type(module).forward is not nn.Module.forward  # type: ignore[comparison-overlap]

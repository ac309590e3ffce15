"""Backward passes that the algorithms share: the recording pass, its probe, and the slow exact path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from sotto.errors import SottoError
from sotto.gradients.base import ClippedSum
from sotto.gradients.pieces import accumulate, owned, wide
from sotto.gradients.rows import Rows
from sotto.gradients.taps import PATIENCE, Book, Phase, Site

if TYPE_CHECKING:
    from sotto.gradients.engine import Engine

UNTAPPED = "used outside the operations that have a fast rule"


def record(engine: Engine, losses: torch.Tensor, rows: Rows, make: Callable[[set[str]], Book], *, retain: bool) -> Book:
    """One backward pass in which tapped operations fill a book; finds what needs the slow path and adds its norms.

    Args:
      make: an empty book, given the names of parameters that are used more than once.
      retain: keep the graph afterwards. It is kept in any case while something is slow or may turn out to be.

    Returns:
      The book; `squared_UG` is complete.
    """
    state, parameters = engine.state, engine.parameters
    _note_slow(engine, set())  # sites declined in the forward pass
    surveyed, new = _survey(engine, losses, rows), _is_new(engine)
    odd = any(site.confirmed for site in state.unconfirmed)  # the rows of this batch are not like earlier ones
    retain = retain or bool(engine.slow) or (not surveyed and (new or odd))
    for _ in range(len(engine.sites) + 2):  # each round declines a site, finds a parameter used twice, or is the last
        book, known = make(state.shared | state.repeated), list(state.unconfirmed)
        state.book = book
        with engine.during(Phase.RECORD):
            untapped = _gradients(losses, parameters, None, retain)
        left = {name for name, grad in zip(parameters, untapped, strict=True) if grad is not None}
        del untapped
        # Not expected after what the forward pass showed, so not compared yet.
        late = [site for site in _pending(engine, rows) if site not in known and rows.num_rows > 1]
        for site in late:
            site.unreached = 0
        _require_graph(_surprises(engine, book, left) | {site.path for site in late}, retain)
        found = _note_slow(engine, left) | _take_off(engine, book.names) | bool(book.repeated) | bool(late)
        if not found:
            break
        _survey(engine, losses, rows)
    else:
        raise AssertionError("a site was declined twice")
    book.finish()
    state.book = None
    state.repeated |= book.repeated
    engine.tapped |= book.names
    _add_slow_norms(engine, losses, rows, book.squared_UG)
    return book


def _survey(engine: Engine, losses: torch.Tensor, rows: Rows) -> bool:
    """On the first batch that reaches a site, two backward passes that only compare.

    All that could need another pass (declined sites, parameters used twice or outside the taps) is found here, before
    anything is recorded, so that the recording pass may free the graph as it goes: the memory of a first step is that
    of any other.

    Returns:
      Whether they were made.
    """
    pending = _pending(engine, rows)
    while pending:
        left = _probe(engine, losses, rows)
        for site in engine.sites.values():
            if site.declined is None and not site.confirmed and (site in pending or site.reference):
                site.conclude(rows.num_rows)
        uses: Counter[str] = Counter()
        for site in engine.sites.values():
            names = [name for role in site.roles() if (name := site.name(role)) is not None]
            uses.update(dict.fromkeys(names, site.probed if site.declined is None else 0))
        engine.state.repeated |= {name for name, count in uses.items() if count > 1}
        for name in left - engine.slow.keys():
            engine.slow[name] = UNTAPPED
        if not _note_slow(engine, left) | _take_off(engine, {name for name, count in uses.items() if count}):
            break
    return bool(pending)


def _pending(engine: Engine, rows: Rows) -> list[Site]:
    """Sites to be compared in this batch. With one row there is nothing to compare, but something to find out once."""
    waiting = [site for site in engine.state.unconfirmed if site.declined is None and not site.confirmed]
    return [site for site in waiting if rows.num_rows > 1 or not site.seen_alone]


def _probe(engine: Engine, losses: torch.Tensor, rows: Rows) -> set[str]:
    """Compares all uses under equal and under distinct weights. Returns the names of parameters used untapped."""
    state, left = engine.state, set[str]()
    # Neighbouring rows differ by a factor of two or more, in no order that a permutation would preserve.
    index = torch.arange(rows.num_rows, device=losses.device)
    distinct_B = torch.exp2((torch.remainder(index * 7 + index // 9 * 2, 9) - 4).to(losses.dtype))
    for weight_B in (torch.ones_like(distinct_B), distinct_B):
        state.probe_weight_B, state.probing_first = weight_B, weight_B is not distinct_B
        for site in engine.sites.values():
            site.probed = 0
            if state.probing_first:  # an earlier probe may have ended in an error
                site.reference, site.evidence = [], False
        bad_B = ~torch.isfinite(losses)
        state.others_B = bad_B if bool(bad_B.any()) else None  # such a row must not hide what the others show
        with engine.during(Phase.PROBE):
            untapped = _gradients(losses, engine.parameters, weight_B, True)
        left |= {name for name, grad in zip(engine.parameters, untapped, strict=True) if grad is not None}
        del untapped
    state.probe_weight_B = state.others_B = None
    return left


def _take_off(engine: Engine, tapped: set[str]) -> bool:
    """Declines sites of parameters of which some uses were tapped and others not, so that nothing is counted twice.

    Returns whether there was such a parameter.
    """
    for site in engine.sites.values():
        roles = [role for role in site.roles() if site.name(role) in engine.slow]
        if roles and site.declined is None:
            site.decline("the same parameter is also used where it cannot be tapped")
    return bool(tapped & engine.slow.keys())


def _is_new(engine: Engine) -> bool:
    """On the first batches, whether a parameter exists that may turn out to need the slow path."""
    engine.calls += 1
    return engine.calls <= PATIENCE and not engine.parameters.keys() <= engine.tapped


def _surprises(engine: Engine, book: Book, left: set[str]) -> set[str]:
    """What this pass found out that needs another pass over the same graph. Remembers it, so that a retry succeeds."""
    state = engine.state
    new = left - engine.slow.keys()
    for name in new:
        engine.slow[name] = UNTAPPED
    state.repeated |= book.repeated
    return new | book.repeated


def _add_slow_norms(engine: Engine, losses: torch.Tensor, rows: Rows, squared_UG: torch.Tensor) -> None:
    """Adds the slow parameters' squared norms in place, and marks units whose loss is not finite."""
    bad_B = ~torch.isfinite(losses.detach())
    squared_UG[rows.unit_of_B[bad_B]] = torch.nan
    if not engine.slow:
        return
    slow_UG = torch.zeros_like(squared_UG)
    for unit, grads in slow_gradients(engine, losses, rows):
        add_squares(slow_UG[unit], grads, engine.group_of)
    require_isolated(squared_UG.sum(1), slow_UG.sum(1))
    squared_UG += slow_UG


def add_squares(squared_G: torch.Tensor, grads: dict[str, torch.Tensor], group_of: dict[str, int]) -> None:
    """Adds one unit's squared norms to its row of the groups' squared norms."""
    for name, grad in grads.items():
        squared_G[group_of[name]] += wide(grad).double().square().sum()


def require_isolated(known_U: torch.Tensor, found_U: torch.Tensor) -> None:
    """Raises if a unit's gradient may be non-finite because of another unit.

    In an operation that is not tapped, `0 * inf` of one example spoils the weight gradient of all. To drop all of them
    would let one unit decide over the others' contributions, which no sensitivity covers.

    Args:
      known_U: not finite for units that are known to be at fault themselves.
      found_U: not finite where a pass for that unit alone gave a gradient that is not finite.
    """
    at_fault = ~torch.isfinite(known_U)
    suspect = ~torch.isfinite(found_U) & ~at_fault
    if bool(suspect.any()) and int((suspect | at_fault).sum()) > 1:
        raise SottoError(
            "SOT611", what="a value that is not finite reached the gradients of several units", where="engine.backward",
            why="it arose inside an operation without a fast rule, where one unit cannot be told from another; "
            "nothing was released", fix="see engine.report() for the slow modules; freeze them, or run the step in a "
            "wider dtype",
        )  # fmt: skip


def _gradients(
    losses: torch.Tensor, parameters: dict[str, nn.Parameter], weight_B: torch.Tensor | None, retain: bool
) -> tuple[torch.Tensor | None, ...]:
    weight_B = torch.ones_like(losses) if weight_B is None else weight_B.to(losses.dtype)
    return torch.autograd.grad(losses, list(parameters.values()), weight_B, retain_graph=retain, allow_unused=True)


def _require_graph(new: set[str], retained: bool) -> None:
    if new and not retained:
        raise SottoError(
            "SOT609", what=f"parameter '{min(new)}' was used in a way that no earlier batch used it",
            where="engine.backward", why="its slow path needs the graph of this batch, which is freed already; "
            "nothing was released", fix="compute the losses of this batch again and call backward again",
        )  # fmt: skip


def _note_slow(engine: Engine, left: set[str]) -> bool:
    """Remembers parameters of declined sites. Returns True if a probe has just declined a site."""
    newly_declined = False
    for site in engine.sites.values():
        if site.declined is None:
            continue
        for role in site.roles():
            name = site.name(role)
            if name is None:
                continue
            newly_declined = newly_declined or (name not in engine.slow and name not in left)
            engine.slow[name] = site.declined
    return newly_declined


def one_unit(engine: Engine, losses: torch.Tensor, names: list[str], rows: Rows, unit: int, *, retain: bool):
    """{name: gradient} of one unit, unaffected by other units that are not finite wherever a module is entered."""
    member_B = rows.unit_of_B == unit
    engine.state.others_B = ~member_B
    parameters = engine.parameters
    try:
        with engine.during(Phase.SILENT):
            grads = torch.autograd.grad(
                losses, [parameters[name] for name in names], member_B.to(losses.dtype),
                retain_graph=retain, allow_unused=True,
            )  # fmt: skip
    finally:
        engine.state.others_B = None
    return {name: g for name, g in zip(names, grads, strict=True) if g is not None}


def slow_gradients(engine: Engine, losses: torch.Tensor, rows: Rows):
    """Yields (unit, {name: gradient}) of the parameters on the slow path, one backward pass for each unit."""
    slow = [name for name in engine.parameters if name in engine.slow]
    if not slow:
        return
    for unit in range(rows.num_units):
        yield unit, one_unit(engine, losses, slow, rows, unit, retain=True)


def add_slow(engine: Engine, losses: torch.Tensor, rows: Rows, factor_UG: torch.Tensor, total: dict[str, torch.Tensor]):
    """Adds the slow parameters' weighted sum to `total`; in one backward pass if all units are finite in one group."""
    if not engine.slow:
        return
    if factor_UG.shape[1] == 1 and bool((factor_UG > 0).all()):
        slow = {name: p for name, p in engine.parameters.items() if name in engine.slow}
        with engine.during(Phase.SILENT):
            grads = owned(slow, _gradients(losses, slow, factor_UG[rows.unit_of_B, 0], False))
        for name, grad in grads.items():
            accumulate(total, name, grad)
        return
    for unit, grads in slow_gradients(engine, losses, rows):
        add_scaled(total, grads, factor_UG[unit], engine.group_of)


def add_scaled(
    total: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], factor_G: torch.Tensor, group_of: dict[str, int]
) -> None:
    """Adds one unit's gradients, each times the factor of its group. A factor of zero leaves out nan and inf too."""
    for name, grad in grads.items():
        factor = factor_G[group_of[name]]
        if factor > 0:
            accumulate(total, name, wide(grad) * factor.to(wide(grad).dtype))


def weighted(engine: Engine, losses: torch.Tensor, weight_B: torch.Tensor, bad_B: torch.Tensor | None):
    """Gradients of `sum_i weight_i loss_i`, with rows of non-finite units masked wherever an operation is tapped."""
    engine.state.bad_B = bad_B
    try:
        with engine.during(Phase.PLAIN):
            return owned(engine.parameters, _gradients(losses, engine.parameters, weight_B, bool(engine.slow)))
    finally:
        engine.state.bad_B = None


def complete(engine: Engine, total: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sum in the parameters' order and shape, with zeros for those that no example of the batch reached."""
    missing = {name: p for name, p in engine.parameters.items() if name not in total}
    zeros = ClippedSum.zeros(missing, engine.clipping.sensitivity).gradients
    return {name: total.get(name, zeros.get(name)) for name in engine.parameters}  # type: ignore[misc]

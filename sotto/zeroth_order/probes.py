"""What a batch says about K directions: one finite difference per example and direction.

    d_ik = (f_i(theta + lambda u_k) - f_i(theta - lambda u_k)) / (2 lambda)

estimates u_k . grad f_i (Spall 1992; for language models MeZO, Malladi et al. 2023, arXiv:2305.17333). The numbers of
an example divided by sqrt(K) are a random sketch of its gradient, whose expected squared norm is that of the gradient
for every K: so a clip norm means here what it means for gradients. (Bao et al. 2025 divide by K instead; their
threshold is the one used here over sqrt(K).)

With `directions.centred` it is one pass for each direction, half as many:

    d_ik = (f_i(theta + lambda u_k) - mean_j f_i(theta + lambda u_j)) / lambda

One-sided differences of a batch of directions are those of FZOO (Dang et al. 2025, arXiv:2506.09034). The mean in the
place of the loss at theta costs no pass of its own, and takes away what the curvature adds to all K alike. K numbers
that add up to zero say K - 1 things, so the sketch is over sqrt(K - 1). Each example is compared with itself alone, and
before clipping: sensitivity is as it was.

With smoothing 0 the numbers are u_k . grad f_i itself (`tangents`): one pass of twice the work and memory each.

Where the tensors are split into parts (`Directions.parts`), a probe moves the tensors of one part and looks along its
directions alone; what lies below the first of them is computed once.

Memory: one forward pass, one moved weight matrix, and B K numbers, whatever K is. Only these numbers have to be
exchanged when the directions are shared out among processes (`probes`).

Shape legend: B examples, U units, K directions of a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from sotto.errors import SottoError
from sotto.gradients.rows import Rows
from sotto.privacy.events import check_number
from sotto.zeroth_order.comparison import coupled, differ, require_same, unread
from sotto.zeroth_order.deterministic import Refusing, require_deterministic, run
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.law import bad_argument
from sotto.zeroth_order.perturb import Batch, Perturbed, Side
from sotto.zeroth_order.prefix import Prefix, capture, frozen_modules
from sotto.zeroth_order.sides import Sides, few_and_one, how_many, unfit, width_of
from sotto.zeroth_order.small import MOST, Group, groups
from sotto.zeroth_order.tangents import Tangents, derivatives

Forward = Callable[[Batch], torch.Tensor]

CHECK_SHIFT = 1e-2
"""How far the check moves the weights: a classifier that starts at zero gives all examples one loss until then."""
FAR_SHIFT = 1.0
"""How far the check moves the weights of other sides."""

_CHECKED_ROWS = 3

FAILURES = (SottoError, RuntimeError, IndexError, ValueError, TypeError)
"""What a pass of several sides may end in where one of one side does not."""
_log = logging.getLogger(__name__)


class Prober:
    """Takes the finite differences of a model's losses. The model is left as it is, bit by bit.

    Attributes:
      parameters: name -> the tensors that are perturbed: all that require a gradient; shared ones once.
      width: the most numbers that a layer of the model gives for a token, which limits the sides of a pass; None on a
        GPU, where nothing does.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        directions: Directions,
        smoothing: float = 1e-3,
        *,
        sides: int = 1,
        reuse_prefix: bool = True,
    ):
        """Sets up the probes; runs nothing.

        Args:
          model: in evaluation mode, or without dropout.
          forward: batch -> (B,) losses, one for each row, in float32 or better. What it keeps of the weights that it
            read is overwritten by the next pass.
          directions: for exactly the trainable parameters of the model.
          smoothing: lambda, how far the weights are moved along a direction; 0 for derivatives.
          sides: 1, or an even number: so many moved models in one forward pass (`sides.Sides`), or on a CPU fewer where
            a pass is large enough to be no faster for it (`sides.WIDEST`). 1 with smoothing 0.
          reuse_prefix: compute what lies below the first trainable weight once per batch.

        Raises:
          SottoError: SOT401, smoothing is negative; SOT650, sides is neither 1 nor even, or the directions are
            those of other parameters; SOT651, the model drops out.
        """
        self.smoothing = check_number("smoothing", smoothing, at_least=0)
        if sides != 1 and (sides < 1 or sides % 2 or smoothing == 0):
            why = "the two losses of a direction belong in one pass, and a derivative has but one"
            raise bad_argument("sides", sides, why, "give 1, or an even number with smoothing above 0")
        self.model, self.forward, self.directions, self.sides = model, forward, directions, sides
        self.reuse_prefix = reuse_prefix
        self.parameters = trainable(model)
        if {n: p.shape for n, p in self.parameters.items()} != directions.shapes:
            why = "every trainable weight has a direction, and no other"
            raise bad_argument("directions", sorted(directions.shapes)[:3], why, "make them from trainable(model)")
        require_deterministic(model)
        self._scopes: dict[tuple[str, ...], _Scope] = {}
        self._loud = logging.WARNING
        self._devices = {p.device for p in model.parameters()}
        self.width = width_of(model) if all(d.type == "cpu" for d in self._devices) else None

    # ---- the numbers

    def differences(self, batch: Batch, step: int, probes: Sequence[int] | None = None, part: int = 0) -> torch.Tensor:
        """(B, K) float64 finite differences of a batch's losses, or derivatives; not finite where a loss is not.

        Args:
          batch: tensors with B rows each.
          step: which directions.
          probes: which of the K directions; default all. The result has one column for each. Of centred differences
            this is the half that needs a model, f_i(theta + lambda u_k) / lambda: `sketch` takes the mean away.
          part: whose tensors are moved.

        Raises:
          SottoError: SOT651 to SOT654, the model or the loss cannot be probed; SOT657, it has no forward derivative.
        """
        chosen = range(self.directions.count) if probes is None else probes
        smoothing, rows, moved = self.smoothing, _rows(batch), self.moved(part)
        with torch.no_grad():
            prefix = self._prefix(moved, batch)
            if smoothing == 0:
                found = [self._derivatives(batch, rows, Tangents(moved, self.directions, step, k), prefix)[1]
                         for k in chosen]  # fmt: skip
                return torch.stack(found, 1) if found else torch.zeros(rows, 0, dtype=torch.float64)
            signs = (1.0,) if self.directions.centred else (1.0, -1.0)
            points = [Side(k, sign * smoothing) for k in chosen for sign in signs]
            losses_sB = self._losses_of(batch, step, points, moved, prefix)
        if not losses_sB:
            return torch.zeros(rows, 0, dtype=torch.float64)
        if self.directions.centred:
            return torch.stack(losses_sB, 1) / smoothing
        losses_BK2 = torch.stack(losses_sB, 1).view(rows, -1, 2)
        return (losses_BK2[..., 0] - losses_BK2[..., 1]) / (2 * smoothing)

    def sketch(self, batch: Batch, step: int, units: torch.Tensor | None = None, part: int = 0) -> torch.Tensor:
        """(U, K) sketch of each unit's summed gradient: its examples' differences added up, over `directions.root`.

        Args:
          units: (B,) integer that says to whom each row belongs; default: every row is a unit of its own. All rows of a
            unit must be in this batch.
          part: which these units look at.
        """
        d_BK = self.differences(batch, step, part=part)
        if self.directions.centred:
            d_BK = d_BK - d_BK.mean(1, keepdim=True)
        rows = Rows.build(len(d_BK), units, d_BK.device)
        return rows.add_up(d_BK) / self.directions.root

    def moved(self, part: int) -> dict[str, nn.Parameter]:
        """Name -> those parameters that a probe of this part moves."""
        return {name: p for name, p in self.parameters.items() if self.directions.part[name] == part}

    def _scope(self, moved: Mapping[str, nn.Parameter]) -> _Scope:
        names = tuple(moved)
        if names not in self._scopes:
            self._scopes[names] = _Scope(groups(moved, self.directions, most=MOST), frozen_modules(self.model, moved))
        return self._scopes[names]

    def _prefix(self, moved: Mapping[str, nn.Parameter], batch: Batch) -> Prefix | None:
        if not self.reuse_prefix:
            return None
        return capture(self.model, moved, self.forward, batch, self._scope(moved).frozen)

    def _losses_of(
        self, batch: Batch, step: int, points: Sequence[Side], moved: Mapping[str, nn.Parameter], prefix: Prefix | None
    ) -> list[torch.Tensor]:
        """(B,) float64 losses at each point, several in a pass; a batch that has no such pass goes one at a time."""
        together = how_many(self.sides, self.width, batch)
        try:
            return self._losses(batch, step, points, moved, prefix, together)
        except FAILURES as error:
            if together == 1 or (isinstance(error, SottoError) and error.code != "SOT653"):
                raise
            what = error.what if isinstance(error, SottoError) else unfit(error).why
            _log.log(self._loud, "a batch of %d rows is probed one side at a time: %s", _rows(batch), what)
            self._loud = logging.DEBUG  # once a run is enough
        return self._losses(batch, step, points, moved, prefix, 1)

    def _losses(
        self,
        batch: Batch,
        step: int,
        points: Sequence[Side],
        moved: Mapping[str, nn.Parameter],
        prefix: Prefix | None,
        together: int = 1,
    ) -> list[torch.Tensor]:
        """(B,) float64 losses at each point, so many of them in a pass."""
        found: list[torch.Tensor] = []
        context: Perturbed | None = None
        for start in range(0, len(points), together):
            sides = points[start : start + together]
            if context is None or len(sides) != len(context.sides):
                context = self._context(moved, step, sides, batch)
            found += self._pass(batch, context.at(sides), prefix)
        return found

    def _context(self, moved: Mapping[str, nn.Parameter], step: int, sides: Sequence[Side], batch: Batch) -> Perturbed:
        """In which a pass takes these sides, or as many others."""
        small = self._scope(moved).small
        if len(sides) == 1:
            return Perturbed(moved, self.directions, step, sides, small)
        stored = (*self.model.parameters(), *self.model.buffers())
        return Sides(moved, self.directions, step, sides, batch, stored, small)

    def _pass(self, batch: Batch, moved: Perturbed, prefix: Prefix | None) -> list[torch.Tensor]:
        """(B,) float64 losses for each side. Their own: a view of a moved weight would move with it."""
        repeats, rows = len(moved.sides), _rows(batch)
        if repeats > 1:
            batch = {name: x.expand(repeats, *x.shape).flatten(0, 1) for name, x in batch.items()}

        def forward() -> torch.Tensor:
            with prefix.replay(repeats) if prefix is not None else nullcontext(), moved:
                return self.forward(batch)

        losses = run(forward, self._devices)
        return list(_per_example(losses, repeats * rows).to(torch.float64, copy=True).chunk(repeats))

    def _derivatives(
        self, batch: Batch, rows: int, tangents: Tangents, prefix: Prefix | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) float64 losses, and their derivatives along a direction."""

        def forward() -> torch.Tensor:
            with prefix.replay(1) if prefix is not None else nullcontext(), tangents:
                return _per_example(self.forward(batch), rows)

        with derivatives() as read:
            losses = run(forward, self._devices)
            return forward_ad.unpack_dual(losses).primal.double(), read(losses).double()

    # ---- what has to hold

    def check(self, batch: Batch, step: int = 0) -> None:
        """Runs a batch under weights moved by `CHECK_SHIFT` in several ways, which have to agree.

        As the probes do it (prefix and sides included); with the weights really replaced (one more copy of the
        trainable weights, for this once); and a few rows alone. This finds losses that are averaged over the batch,
        examples that influence one another, weights that are read out of sight, and a kept prefix that is wrong.
        Derivatives are compared as well, with those of duals that are really put in the place of the weights.

        Raises:
          SottoError: SOT651, a function draws random numbers; SOT652, the loss is not one number per example, or
            depends on the other rows; SOT655, the passes differ, or no function is given a trainable weight.
        """
        rows, shift, all_ = _rows(batch), max(self.smoothing, CHECK_SHIFT), self.parameters
        both = [Side(k, sign * shift) for k in range(self.directions.count) for sign in (1, -1)]
        points = both[: self.sides]
        with torch.no_grad():
            prefix = self._prefix(all_, batch)
            context = self._context(all_, step, points[:1], batch)
            with Refusing():
                (plain,) = self._pass(batch, context, None)
            if not context.asked:
                raise unread()
            truth = self._truth(batch, step, points[0])
            for row in sorted({0, rows // 2, rows - 1})[:_CHECKED_ROWS]:
                alone = {name: x[row : row + 1] for name, x in batch.items()}
                same = self._losses(alone, step, points[:1], all_, None)[0]
                require_same(self.model, plain[row : row + 1], same, coupled())
            require_same(self.model, truth, plain, differ("one perturbed weight at a time"))
            truths = [truth, *(self._truth(batch, step, point) for point in points[1:])]
            together = how_many(self.sides, self.width, batch)
            self._check_passes(batch, step, points, truths, prefix, together)
            if self.sides > 1:
                self._check_sides(few_and_one(batch), step, points)
            if self.smoothing == 0:
                self._check_derivatives(batch, rows, Tangents(all_, self.directions, step, 0), prefix)

    def _check_passes(
        self,
        batch: Batch,
        step: int,
        points: Sequence[Side],
        truths: list[torch.Tensor],
        prefix: Prefix | None,
        together: int,
    ) -> None:
        """Compares the passes of the probes, of a model that can be run, with losses under weights really moved."""
        try:
            losses = self._losses(batch, step, points, self.parameters, prefix, together)
        except FAILURES as error:
            if together == 1 or isinstance(error, SottoError):
                raise
            raise unfit(error) from error
        for truth, found in zip(truths, losses, strict=True):
            require_same(self.model, truth, found, differ("the kept prefix or several sides at once"))

    def _check_sides(self, batch: Batch, step: int, points: Sequence[Side]) -> None:
        """Compares passes of all sides, of rows of other lengths and in another number than the batch has.

        What is no row, but as long as all rows of one batch by chance, is not as long as those of both. And the weights
        of one side are left as they are while the others go far: whatever little of another side reached it would show.
        """
        prefix, found = self._prefix(self.parameters, batch), differ("one of several sides at once")
        truths = [self._truth(batch, step, point) for point in points]
        self._check_passes(batch, step, points, truths, prefix, self.sides)
        apart = [Side(points[0].k, 0.0), *(Side(p.k, FAR_SHIFT) for p in points[1:])]
        alone = self._losses(batch, step, apart, self.parameters, prefix, self.sides)[0]
        truth = _per_example(self.forward(batch), _rows(batch)).double()
        require_same(self.model, truth, alone, found, overflow=False)

    def _truth(self, batch: Batch, step: int, point: Side) -> torch.Tensor:
        """(B,) float64 losses with the weights really replaced."""
        moved = Perturbed(self.parameters, self.directions, step, [point])
        really = {name: moved.moved(p, point) for name, p in self.parameters.items()}
        return _per_example(self._forward_with(really, batch), _rows(batch)).double()

    def _check_derivatives(self, batch: Batch, rows: int, tangents: Tangents, prefix: Prefix | None) -> None:
        _, found = self._derivatives(batch, rows, tangents, prefix)
        with derivatives() as read:
            duals = {name: tangents.moved(p, tangents.sides[0]) for name, p in self.parameters.items()}
            truth = read(self._forward_with(duals, batch)).double()
        require_same(self.model, truth, found, differ("a tangent in the place of each weight"))

    def _forward_with(self, weights: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        holder = _Holder(self.model, self.forward)
        named = {f"model.{name}": value for name, value in weights.items()}
        return functional_call(holder, named, (batch,), tie_weights=True)


class _Scope(NamedTuple):
    """What stays the same for some of the parameters from step to step."""

    small: list[Group]
    frozen: list[nn.Module]


class _Holder(nn.Module):
    """A module whose forward is a function of another one, so that `functional_call` can lend it weights."""

    def __init__(self, model: nn.Module, forward: Forward):
        super().__init__()
        self.model, self.run = model, forward

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.run(batch)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> trainable parameter; one that several modules share has its first name only."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _rows(batch: Batch) -> int:
    counts = {len(x) for x in batch.values()}
    if len(counts) == 1:
        return counts.pop()
    why = "a row of the batch is an example in every tensor"
    raise bad_argument("batch", sorted(counts), why, "give tensors with the same number of rows")


def _per_example(losses: torch.Tensor, rows: int) -> torch.Tensor:
    if losses.shape != (rows,):
        raise SottoError(
            "SOT652", what=f"the loss has shape {tuple(losses.shape)}, the batch {rows} rows", where="forward",
            why="each person's influence is bounded by clipping his or her own numbers, which an average over the "
            "batch no longer shows", fix="return one loss for each row: reduction='none'",
        )  # fmt: skip
    if torch.finfo(losses.dtype).bits < 32:
        raise SottoError(
            "SOT652", what=f"the losses are {losses.dtype}", where="forward",
            why="their differences are divided by a small number, which makes rounding errors large",
            fix="compute the loss from logits in float32",
        )  # fmt: skip
    return losses

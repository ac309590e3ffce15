"""Where gradients are intercepted: one `Site` per module that owns trainable parameters.

While an engine is attached, such a module's `forward` runs a *tapped* version of its operation: an autograd function
that gives the same output and the same input gradient, but in the backward pass hands `(input, output gradient)` to the
engine instead of computing the batch's weight gradient. No module is wrapped or renamed, hooks and keyword arguments
are untouched, and recomputation under gradient checkpointing passes through the same code.

**Safe by construction.** A tapped use returns no gradient for its parameter. So whatever `torch.autograd.grad` still
finds for a parameter came from a use that nobody tapped (a functional call, a bare parameter, a rule that declined),
and the engine then takes the slow exact path for that parameter. A use cannot be missed silently.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sotto.errors import SottoError
from sotto.gradients.pieces import Piece, combine, settle, squared_norms
from sotto.gradients.rows import Rows
from sotto.gradients.sketch import Sketch

PATIENCE = 3
"""Backward passes that keep the graph for a site whose output has not influenced a loss yet (an unused pooler)."""


class Phase(enum.Enum):
    """What tapped operations do in a backward pass."""

    PLAIN = "return parameter gradients, as if nothing were attached"
    RECORD = "hand pieces to the book, return none"
    PROBE = "compare output gradients with those of a pass under other weights, return none"
    SILENT = "return none"


@dataclass
class Book:
    """Pieces of one backward pass. Norms are added up as they come, in float64.

    Attributes:
      group_of: parameter name -> the column of `squared_UG` that its norm belongs to.
    """

    rows: Rows
    keep: bool
    shared: set[str]
    group_of: dict[str, int]
    squared_UG: torch.Tensor
    kept: dict[str, list[Piece]] = field(default_factory=dict)
    waiting: dict[str, list[Piece]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    """Names that came twice without being known as shared: `squared_UG` is wrong and the pass must be run again."""

    def add(self, name: str, piece: Piece) -> None:
        seen = name in self.names
        self.names.add(name)
        if name in self.shared:  # the norm of a sum needs all its terms
            self.waiting.setdefault(name, []).append(piece)
            return
        if seen:
            self.repeated.add(name)
        piece = settle(piece, self.rows, self.keep)
        self.squared_UG[:, self.group_of[name]] += piece.squared_norms(self.rows).double()
        if self.keep:
            self.kept.setdefault(name, []).append(piece)

    def finish(self) -> None:
        """Adds the norms of parameters that were used more than once."""
        for name in list(self.waiting):
            pieces = self.waiting.pop(name)
            if len(pieces) > 1:
                self.repeated.add(name)
            pieces = combine(pieces, self.rows, self.keep)
            self.squared_UG[:, self.group_of[name]] += squared_norms(pieces, self.rows).double()
            if self.keep:
                self.kept[name] = pieces


@dataclass
class State:
    """What all sites of one engine share.

    Attributes:
      names: id of a trainable parameter -> its name.
      constants: ids of the model's parameters and buffers, which never have a row for each example.
      bad_B: (B,) rows whose unit is not finite, masked out when true gradients are returned.
      others_B: (B,) rows outside the one unit whose gradient a pass computes. Their output gradients are zero times
        something; where that something is not finite they would be nan, so they are masked.
      input_shapes: (B, T) shapes of the model's last inputs; batch_size is their B, or 0 if unknown.
      inside: the model's own forward is running, so input_shapes and batch_size speak of this very call.
      uses: how often each parameter was used since the last backward pass; those used twice are `shared`.
      probe_weight_B, probing_first: the weights of the losses in a probing pass, and whether it is the first of two,
        the one that is compared with.
      repeated: parameters that have ever come twice in one backward pass. Forward uses are counted per backward call,
        so they are not known for the second of two graphs that were built before either was used.
    """

    names: dict[int, str] = field(default_factory=dict)
    constants: set[int] = field(default_factory=set)
    phase: Phase = Phase.PLAIN
    book: Book | None = None
    bad_B: torch.Tensor | None = None
    others_B: torch.Tensor | None = None
    input_shapes: set[tuple[int, ...]] = field(default_factory=set)
    inside: bool = False
    in_backward: bool = False
    paused: bool = False
    uses: dict[str, int] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    unconfirmed: list[Site] = field(default_factory=list)
    batch_size: int = 0
    probe_weight_B: torch.Tensor | None = None
    probing_first: bool = False

    def isolate(self, g: torch.Tensor) -> torch.Tensor:
        """In a pass for one unit, removes what other rows' infinities made of their zero output gradients.

        Only values that are not finite are touched, so nothing is lost where dimension 0 is not the batch after all.
        """
        if self.others_B is None or g.numel() == 0:
            return g
        bad = ~torch.isfinite(g)
        if g.dim() > 0 and g.shape[0] % len(self.others_B) == 0:  # (B, ...), or (B*T, ...) flattened
            repeats = g.shape[0] // len(self.others_B)
            others = self.others_B.repeat_interleave(repeats)
            bad = bad & others.view(-1, *[1] * (g.dim() - 1))
        return g.masked_fill(bad, 0)

    def forget(self) -> None:
        """Drops what belongs to one backward call, also when it ended in an error."""
        self.book = self.bad_B = self.others_B = self.probe_weight_B = None
        self.uses.clear()
        self.shared.clear()
        for site in self.unconfirmed:
            site.reference, site.evidence = [], False
        self.unconfirmed.clear()


class Site:
    """One module that owns trainable parameters.

    A site is *confirmed* once a probe has shown that row i of its output gradient depends on loss i alone; until then
    every backward pass that uses it is probed. A site is *declined* when its rows cannot be told apart by example; its
    parameters then take the slow path. If the probe fails where rows surely are examples, the model couples examples
    and is refused.
    """

    def __init__(self, state: State, path: str, module: nn.Module, rule: str, make: Callable[[Site], Any]):
        self.state, self.path, self.module, self.rule, self.make = state, path, module, rule, make
        self.original: Callable[..., Any] = module.forward
        self.confirmed = False
        # Rows of an anchored site are surely the batch's examples. A routed expert sees tokens in any order; a shared
        # one sees all of them, as any layer does.
        self.anchored = "expert" not in path.lower().replace("shared_expert", "")
        self.declined: str | None = None
        self.tapped_in_forward = False
        self.reference: list[Sketch] = []
        self.probed = 0
        """Uses in the probing pass that runs or ran last."""
        self.evidence = False
        self.unreached = 0
        self.seen_alone = False
        """Surveyed in a batch of one row: its rows are counted rightly, but nothing was compared."""

    def trains(self, *roles: str) -> bool:
        return any((p := self.module._parameters.get(r)) is not None and p.requires_grad for r in roles)

    def roles(self) -> list[str]:
        return list(self.module._parameters)

    def own(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters(recurse=False) if p.requires_grad]

    def name(self, role: str) -> str | None:
        """The engine's name of a parameter of this module, if it is trainable."""
        parameter = self.module._parameters.get(role)
        return self.state.names.get(id(parameter)) if parameter is not None and parameter.requires_grad else None

    def entering(self, x: torch.Tensor, *roles: str) -> None:
        """Counts a forward use, so that parameters used twice are known before the backward pass begins.

        Args:
          x: the module's input. If its rows do not look like examples, the graph is kept, because the site may be
            declined in the backward pass.
          roles: what the module uses.
        """
        if self.state.in_backward:  # recomputation of a checkpointed block is not another use
            return
        for role in roles:
            if (name := self.name(role)) is not None:
                uses = self.state.uses[name] = self.state.uses.get(name, 0) + 1
                if uses > 1:
                    self.state.shared.add(name)
        waits = not self.confirmed and self.unreached < PATIENCE
        if (waits or self._doubtful(x)) and self not in self.state.unconfirmed:
            self.state.unconfirmed.append(self)

    def _doubtful(self, x: torch.Tensor) -> bool:
        size = self.state.batch_size
        if not self.state.inside:
            return x.shape[0] == 1
        return x.shape[0] != size and (x.dim() != 2 or self.fold(x, size).dim() == 2)

    def decline(self, reason: str) -> None:
        self.declined, self.confirmed = reason, False
        self.reference.clear()
        if not self.state.in_backward:
            self.tapped_in_forward = False

    def active(self) -> bool:
        """Whether this forward call is to be tapped."""
        if self.state.paused or not torch.is_grad_enabled():
            return False
        if not self.state.in_backward:
            self.tapped_in_forward = self.declined is None
        # A checkpointed block must recompute what it computed, also when the site has been declined in between.
        return self.tapped_in_forward

    def owns(self, *tensors: Any) -> bool:
        """False for a weight that is computed from other parameters (weight norm, `functional_call`): it has a graph of
        its own, which would get no gradient from a tapped operation."""
        return all(t is None or t.is_leaf for t in tensors)

    def receive(self, g: torch.Tensor, pieces: Callable[[Rows], dict[str, Piece]]) -> bool:
        """Called by a tapped operation in the backward pass.

        Args:
          g: the output gradient, rows in dimension 0.
          pieces: parameter role -> piece, computed only when they are wanted.

        Returns:
          True if the operation has to return true parameter gradients itself.
        """
        phase = self.state.phase
        if phase is Phase.PLAIN or self.declined is not None:
            return True
        if phase is Phase.SILENT:
            return False
        book, weight_B = self.state.book, self.state.probe_weight_B
        rows = len(weight_B) if weight_B is not None else book.rows.num_rows if book is not None else 0
        routed = not self.anchored and g.dim() == 2 and rows > 1
        g = self.fold(g, rows)
        if g.dim() < 2 or g.shape[0] != rows or routed:
            self.decline(f"its rows ({g.shape[0]}) are not the batch's {rows} examples")
            return True
        if phase is Phase.PROBE:
            self._compare(g)
            return False
        assert book is not None
        if not self.confirmed and self not in self.state.unconfirmed:
            self.state.unconfirmed.append(self)
        for role, piece in pieces(book.rows).items():
            if (name := self.name(role)) is not None:
                book.add(name, piece)
        return False

    def fold(self, x: torch.Tensor, num_rows: int) -> torch.Tensor:
        """(B*T, d) -> (B, T, d) for layers that a model runs on flattened tokens; anything else as it is.

        Tokens that were routed (experts) may by accident be B*T as well, in another order, so they are never folded.
        """
        if x.dim() == 2 and x.shape[0] != num_rows and self.anchored:
            for shape in self.state.input_shapes:
                if len(shape) == 2 and shape[0] == num_rows and x.shape[0] == num_rows * shape[1]:
                    return x.view(num_rows, shape[1], x.shape[1])
        return x

    def _compare(self, g: torch.Tensor) -> None:
        """Under losses weighted by w, row i must be exactly w_i times what it was: then it depends on loss i alone."""
        self.probed += 1
        if self.confirmed:
            return
        weight_B, first = self.state.probe_weight_B, self.state.probing_first
        assert weight_B is not None
        if first:
            self.reference.append(Sketch.of(g))
            return
        before = self.reference[self.probed - 1] if self.probed <= len(self.reference) else None
        if before is None or before.shape != g.shape:
            raise _coupled(self.path, "its backward pass is not repeatable")
        if before.follows(g, weight_B):
            self.evidence = self.evidence or before.rows_with_gradient > 1
        elif not self.anchored:
            self.decline("its rows are not the examples of the batch")
        elif before.across is not None and before.across.follows(g.transpose(0, 1), weight_B):
            self.decline("its second dimension is the batch, not its first")
        else:
            raise _coupled(self.path, "the gradient of one example changes with the loss of another")

    def conclude(self, num_rows: int) -> None:
        """After a probe: confirmed if every use was compared and at least two rows had a gradient to compare.

        A LoRA factor whose partner is still zero has none on the first step; it is probed again on the next.
        """
        self.seen_alone = self.seen_alone or num_rows == 1
        if not self.reference:
            self.unreached += 1
        elif self.declined is None and self.probed == len(self.reference) and self.evidence:
            self.confirmed = True
        self.reference, self.evidence = [], False


def _coupled(path: str, reason: str) -> SottoError:
    return SottoError(
        "SOT601",
        what="examples of the batch influence one another",
        where=f"module '{path}'",
        why=f"{reason}; a clipped sum of per-unit gradients does not exist for such a model, so no guarantee holds",
        fix="look for batch statistics, a loss averaged over the batch, or an auxiliary router loss, and remove it",
    )


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast would use for matrix products on this tensor, or None when it is off."""
    kind = x.device.type
    if x.dtype is torch.float64 or not torch.is_autocast_enabled(kind):  # autocast leaves float64 alone
        return None
    return torch.get_autocast_dtype(kind)

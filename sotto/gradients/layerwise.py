"""Layer-wise: clip each layer inside the one backward pass, as soon as its gradient is known, and drop everything.

Time and memory of non-private training, because nothing waits for the norm of the whole gradient (He et al. 2022,
arXiv 2212.01539). Each layer has its own threshold (`clipping`), so the sum is another one than that of flat clipping;
it is still one vector of bounded norm, and one Gaussian.

A unit whose gradient is not finite in one layer contributes zero to that layer. One whose loss is not finite
contributes nothing at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sotto.gradients import passes
from sotto.gradients.base import ClippedSum
from sotto.gradients.clipping import Clipping
from sotto.gradients.pieces import Piece, accumulate
from sotto.gradients.rows import Rows
from sotto.gradients.taps import Book

if TYPE_CHECKING:
    from sotto.gradients.engine import Engine


@dataclass
class LayerBook(Book):
    """A book that turns a layer's pieces into its clipped sum once all of them have come.

    Attributes:
      missing: group -> names of its parameters that have not come yet. A group with a parameter that is used twice or
        is on the slow path is not complete before the pass is over, and waits.
    """

    clipping: Clipping = field(kw_only=True)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: dict[int, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, group in self.group_of.items():
            self.missing.setdefault(group, set()).add(name)

    def add(self, name: str, piece: Piece) -> None:
        super().add(name, piece)
        if name in self.shared:
            return
        group = self.group_of[name]
        self.missing[group].discard(name)
        if not self.missing[group]:
            self.clip([other for other in self.kept if self.group_of[other] == group])

    def clip(self, names: list[str]) -> None:
        """Adds the clipped sums of these parameters, whose groups' norms are complete, and forgets their pieces."""
        norms_UG = self.squared_UG.sqrt()
        factor_UG, bad_UG = self.clipping.coefficients(norms_UG), ~torch.isfinite(norms_UG)
        for name in names:
            group = self.group_of[name]
            bad_U = bad_UG[:, group] if bool(bad_UG[:, group].any()) else None
            uses = self.kept.pop(name)
            while uses:
                accumulate(self.sums, name, uses.pop().weighted_sum(factor_UG[:, group], self.rows, bad_U))


def run(engine: Engine, losses: torch.Tensor, rows: Rows) -> ClippedSum:
    bad_U = rows.unit_of_B[~torch.isfinite(losses)]

    def make(shared: set[str]) -> LayerBook:
        squared_UG = engine.no_norms(rows)
        squared_UG[bad_U] = torch.nan  # known before the first layer is clipped
        return LayerBook(rows, True, shared, engine.group_of, squared_UG, clipping=engine.clipping)

    book = passes.record(engine, losses, rows, make, retain=False)
    assert isinstance(book, LayerBook)
    book.clip(list(book.kept))
    norms_UG = book.squared_UG.sqrt()
    passes.add_slow(engine, losses, rows, engine.clipping.coefficients(norms_UG), book.sums)
    return ClippedSum(passes.complete(engine, book.sums), norms_UG, engine.clipping.sensitivity)

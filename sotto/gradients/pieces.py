"""What one use of a parameter contributes to the per-unit gradients, in the cheapest form that is still exact.

A linear layer's gradient for one unit is `g^T a`: two thin matrices. An embedding's is a few rows. Keeping those forms
gives norms without ever building a gradient per unit ("ghost norms": Li et al. 2021, arXiv 2110.05679; the choice
between ghost and instantiation: Bu et al. 2022, arXiv 2210.00038).

Shape legend: see rows.py. V is the number of embedding rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from sotto.gradients.rows import Rows

CHUNK = 1 << 24
"""Numbers held at once while gradients of single rows are added up into units."""

BLOCK = 256
"""Tokens on a side of the Gram matrices held at once."""

TRAFFIC = 110
"""Multiplications that take as long as moving one number of an instantiated gradient through memory three times, as
measured on a CPU with AVX-512."""

HOARD = 1.5
"""How many numbers of instantiated gradients may be kept where `(a, g)` would be one."""


def accumulate(total: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    """Adds `value`, which nobody else may hold, to what `total` has under this name."""
    if name in total:
        total[name] += value
    else:
        total[name] = value


def wide(x: torch.Tensor) -> torch.Tensor:
    """Norms and sums are accumulated in float32 or better."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def owned(names: Iterable[str], grads: tuple[torch.Tensor | None, ...]) -> dict[str, torch.Tensor]:
    """{name: gradient} in float32 or better. Autograd may give one tensor to two parameters, or a view; these are
    copied, because the sum will be added to in place."""
    found: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, grad in zip(names, grads, strict=True):
        if grad is None:
            continue
        own = wide(grad)
        if own is grad and (not grad.is_contiguous() or grad._is_view() or grad.untyped_storage()._cdata in taken):
            own = grad.clone(memory_format=torch.contiguous_format)
        taken.add(own.untyped_storage()._cdata)
        found[name] = own
    return found


def _zero_bad(x_B: torch.Tensor, bad_B: torch.Tensor | None) -> torch.Tensor:
    """Rows of units that contribute nothing become zero; multiplying by a zero factor would leave nan and inf there."""
    if bad_B is None:
        return x_B
    return torch.where(bad_B.view(-1, *[1] * (x_B.dim() - 1)), torch.zeros((), dtype=x_B.dtype, device=x_B.device), x_B)


def _scale(x_B: torch.Tensor, factor_B: torch.Tensor) -> torch.Tensor:
    return x_B * factor_B.to(x_B.dtype).view(-1, *[1] * (x_B.dim() - 1))


def never_too_small(squared_U: torch.Tensor, size_U: torch.Tensor) -> torch.Tensor:
    """Adds the rounding error to squared norms that are left over from much larger terms cancelling.

    A norm that comes out too small lets a unit contribute more than the clipping norm. Where less than a thousandth can
    be rounding, nothing is added; elsewhere the norm becomes an upper bound. nan stays nan.

    Args:
      squared_U: sums of terms of either sign; rounding may have left them slightly negative.
      size_U: the square root of what they would be had no term cancelled another.
    """
    error_U = (size_U * (4 * torch.finfo(size_U.dtype).eps) ** 0.5).square()
    squared_U = squared_U.clamp(min=0)
    return torch.where(squared_U < 1e3 * error_U, squared_U + error_U, squared_U)


@dataclass
class Instantiated:
    """Gradients themselves, already summed over each unit's rows: `grad_U` is (U, *parameter shape).

    Attributes:
      ours: nobody else holds `grad_U`, so that it may be added to in place.
    """

    grad_U: torch.Tensor
    ours: bool = False

    def squared_norms(self, rows: Rows) -> torch.Tensor:
        # In short runs, because a single sum of many millions in float32 loses digits.
        flat, run = self.grad_U.flatten(1), 4096
        whole = flat.shape[1] // run * run
        squared_U = torch.linalg.vector_norm(flat[:, whole:], dim=1).double().square()
        if whole:
            norms = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, run)), dim=2).double()
            squared_U += norms.square().sum(1)
        return squared_U

    def weighted_sum(self, factor_U: torch.Tensor, rows: Rows, bad_U: torch.Tensor | None) -> torch.Tensor:
        shape = self.grad_U.shape[1:]
        good = _zero_bad(self.grad_U, bad_U).flatten(1)
        return (factor_U.to(good.dtype) @ good).view(shape)

    def instantiate(self, rows: Rows) -> torch.Tensor:
        return self.grad_U


@dataclass
class Factored:
    """A matrix used as `y = a W^T`: row i's gradient is `g_i^T a_i`, or `a_i^T g_i` if `transposed` (W is (d, p))."""

    a_BTd: torch.Tensor
    g_BTp: torch.Tensor
    transposed: bool

    def instantiation_is_cheaper(self, rows: Rows, keep: bool) -> bool:
        """Whether to compute each unit's gradient now, instead of its ghost norm.

        Time per unit: `T^2 (p+d)` multiplications for the ghost norm, against p*d numbers that are written, read for
        the norm and read for the sum. The product that makes them is not extra work if it is kept, since it stands in
        for the weighted product of the ghost norm's way. Bytes kept: p*d numbers against `T (p+d)`.
        """
        most = 1 if rows.slots_UK is None else rows.slots_UK.shape[1]
        length, d, p = self.a_BTd.shape[1] * most, self.a_BTd.shape[2], self.g_BTp.shape[2]
        work = TRAFFIC if keep else TRAFFIC + length
        return p * d * work <= length**2 * (p + d) and p * d <= HOARD * length * (p + d)

    def squared_norms(self, rows: Rows) -> torch.Tensor:
        a, g = rows.concatenate(wide(self.a_BTd)), rows.concatenate(wide(self.g_BTp))
        if a.shape[1] == 1:
            return a.square().sum((1, 2)) * g.square().sum((1, 2))
        total_U, size_U = a.new_zeros(len(a)), a.new_zeros(len(a))
        blocks = list(zip(a.split(BLOCK, 1), g.split(BLOCK, 1), strict=True))
        for i, (a_i, g_i) in enumerate(blocks):
            for j, (a_j, g_j) in enumerate(blocks[: i + 1]):  # the Gram matrices are symmetric: half of them is enough
                gram_a, gram_g = torch.bmm(a_i, a_j.transpose(1, 2)), torch.bmm(g_i, g_j.transpose(1, 2))
                if i == j:
                    size_U += (gram_a.diagonal(dim1=1, dim2=2) * gram_g.diagonal(dim1=1, dim2=2)).sqrt().sum(1)
                total_U += gram_a.mul_(gram_g).sum((1, 2)) * (1 if i == j else 2)
        return never_too_small(total_U, size_U)

    def weighted_sum(self, factor_U: torch.Tensor, rows: Rows, bad_U: torch.Tensor | None) -> torch.Tensor:
        factor_B = factor_U[rows.unit_of_B]
        bad_B = None if bad_U is None else bad_U[rows.unit_of_B]
        a, g = _zero_bad(wide(self.a_BTd), bad_B), _zero_bad(wide(self.g_BTp), bad_B)
        if a.shape[2] < g.shape[2]:
            a = _scale(a, factor_B)
        else:
            g = _scale(g, factor_B)
        a, g = a.flatten(0, 1), g.flatten(0, 1)
        return a.T @ g if self.transposed else g.T @ a

    def instantiate(self, rows: Rows) -> torch.Tensor:
        a, g = wide(self.a_BTd), wide(self.g_BTp)
        left, right = (a, g) if self.transposed else (g, a)
        if rows.slots_UK is None:
            return torch.bmm(left.transpose(1, 2), right)
        shape = (left.shape[2], right.shape[2])
        total = a.new_zeros((rows.num_units, shape[0] * shape[1]))
        step = max(1, CHUNK // (shape[0] * shape[1]))
        for start in range(0, rows.num_rows, step):
            part = slice(start, start + step)
            grad_B = torch.bmm(left[part].transpose(1, 2), right[part])
            # Flat, because index_add_ is a thousand times slower on CPU when it has three dimensions.
            total.index_add_(0, rows.unit_of_B[part], grad_B.flatten(1))
        return total.view(rows.num_units, *shape)


@dataclass
class Indexed:
    """Rows of an embedding: token t of row i adds `g_it` to row `ids_it`. Never builds (B, T, V) or (B, V, d)."""

    ids_BT: torch.Tensor
    g_BTd: torch.Tensor
    num_embeddings: int
    padding_idx: int | None

    def __post_init__(self) -> None:
        if self.padding_idx is not None:  # autograd leaves that row's gradient at zero
            self.g_BTd = self.g_BTd.masked_fill((self.ids_BT == self.padding_idx)[..., None], 0)

    def squared_norms(self, rows: Rows) -> torch.Tensor:
        g = wide(self.g_BTd)
        key = rows.unit_of_B[:, None] * self.num_embeddings + self.ids_BT
        unique, inverse = torch.unique(key.flatten(), return_inverse=True)
        summed = g.new_zeros((len(unique), g.shape[2])).index_add_(0, inverse, g.flatten(0, 1))
        unit = torch.div(unique, self.num_embeddings, rounding_mode="floor")
        return g.new_zeros(rows.num_units).index_add_(0, unit, summed.square().sum(1))

    def weighted_sum(self, factor_U: torch.Tensor, rows: Rows, bad_U: torch.Tensor | None) -> torch.Tensor:
        bad_B = None if bad_U is None else bad_U[rows.unit_of_B]
        g = _scale(_zero_bad(wide(self.g_BTd), bad_B), factor_U[rows.unit_of_B])
        total = g.new_zeros((self.num_embeddings, g.shape[2]))
        return total.index_add_(0, self.ids_BT.flatten(), g.flatten(0, 1))

    def instantiate(self, rows: Rows) -> torch.Tensor:
        total = wide(self.g_BTd[:0]).new_zeros((rows.num_units, self.num_embeddings, self.g_BTd.shape[2]))
        return self.add_to(total, rows)

    def add_to(self, total_UVd: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Adds to the gradients of each unit in place, and returns them."""
        key = rows.unit_of_B[:, None] * self.num_embeddings + self.ids_BT
        total_UVd.flatten(0, 1).index_add_(0, key.flatten(), wide(self.g_BTd).flatten(0, 1))
        return total_UVd


class Call(Protocol):
    """One use of a module that is run again: `rules/rerun.py`."""

    def squared_norms(self, name: str, rows: Rows) -> torch.Tensor: ...

    def weighted_sum(
        self, name: str, factor_U: torch.Tensor, rows: Rows, bad_U: torch.Tensor | None
    ) -> torch.Tensor: ...

    def instantiate(self, rows: Rows, names: list[str]) -> dict[str, torch.Tensor]: ...


@dataclass
class OfCall:
    """One parameter's part of a module that is run again whenever its gradients are wanted."""

    call: Call
    name: str

    def squared_norms(self, rows: Rows) -> torch.Tensor:
        return self.call.squared_norms(self.name, rows)

    def weighted_sum(self, factor_U: torch.Tensor, rows: Rows, bad_U: torch.Tensor | None) -> torch.Tensor:
        return self.call.weighted_sum(self.name, factor_U, rows, bad_U)

    def instantiate(self, rows: Rows) -> torch.Tensor:
        return self.call.instantiate(rows, [self.name])[self.name]


Piece = Instantiated | Factored | Indexed | OfCall


def settle(piece: Piece, rows: Rows, keep: bool) -> Piece:
    """A piece in its cheapest form. `keep`: it is kept for the weighted sum, and not only for its norm."""
    if isinstance(piece, Factored) and piece.instantiation_is_cheaper(rows, keep):
        return Instantiated(piece.instantiate(rows), ours=True)
    return piece


def combine(pieces: list[Piece], rows: Rows, keep: bool) -> list[Piece]:
    """Several uses of one parameter (a layer called twice, a tied embedding) in the cheapest form of their sum."""
    merged = [settle(piece, rows, keep) for piece in _merge(pieces, rows)]
    full = next((p for p in merged if isinstance(p, Instantiated)), None)
    tied = {type(p) for p in merged} == {Indexed, Factored} and len(merged) == 2
    if len(merged) == 1 or (tied and not any(isinstance(p, Factored) and p.transposed for p in merged)):
        return merged
    total = merged[0].instantiate(rows) if full is None else full.grad_U
    if full is not None and not full.ours:
        total = total.clone()
    for piece in merged if full is not None else merged[1:]:
        if piece is full:
            continue
        if isinstance(piece, Indexed):
            piece.add_to(total, rows)
        else:
            total += piece.instantiate(rows)
    return [Instantiated(total, ours=True)]


def squared_norms(pieces: list[Piece], rows: Rows) -> torch.Tensor:
    """(U,) squared norms of the sum of what `combine` gave."""
    if len(pieces) == 1:
        return pieces[0].squared_norms(rows)
    indexed = next(p for p in pieces if isinstance(p, Indexed))
    factored = next(p for p in pieces if isinstance(p, Factored))
    first, second = indexed.squared_norms(rows), factored.squared_norms(rows)
    cross = 2 * _tied_inner_product(indexed, factored, rows)
    return never_too_small(first + second + cross, first.sqrt() + second.sqrt())


def _merge(pieces: list[Piece], rows: Rows) -> list[Piece]:
    """Uses of the same form are one use with a longer T. Modules that are run again give their gradients at once."""
    factored = [p for p in pieces if isinstance(p, Factored)]
    indexed = [p for p in pieces if isinstance(p, Indexed)]
    merged: list[Piece] = [p for p in pieces if isinstance(p, Instantiated)]
    merged += [Instantiated(p.instantiate(rows), ours=True) for p in pieces if isinstance(p, OfCall)]
    if factored:
        flip = factored[0].transposed  # a matrix may be used as W here and as its transpose there: swap a and g
        a = [p.a_BTd if p.transposed == flip else p.g_BTp for p in factored]
        g = [p.g_BTp if p.transposed == flip else p.a_BTd for p in factored]
        merged.append(factored[0] if len(factored) == 1 else Factored(torch.cat(a, 1), torch.cat(g, 1), flip))
    if indexed:
        first = indexed[0]
        ids, g = [p.ids_BT for p in indexed], [p.g_BTd for p in indexed]
        longer = Indexed(torch.cat(ids, 1), torch.cat(g, 1), first.num_embeddings, None) if len(indexed) > 1 else first
        merged.append(longer)
    return merged


def _tied_inner_product(embedding: Indexed, head: Factored, rows: Rows) -> torch.Tensor:
    """<G_E, G_H> per unit, `sum_{t,s} g^H_s[x_t] (a^H_s . g^E_t)`, when one matrix embeds tokens and scores them."""
    a, g = rows.concatenate(wide(head.a_BTd)), rows.concatenate(wide(head.g_BTp))
    ids = rows.concatenate(embedding.ids_BT[..., None].double()).squeeze(-1).long()
    g_embedding = rows.concatenate(wide(embedding.g_BTd))
    similarity_UTS = torch.bmm(g_embedding, a.transpose(1, 2))
    picked_UTS = torch.gather(g.transpose(1, 2), 1, ids[..., None].expand(-1, -1, g.shape[1]))
    return (similarity_UTS * picked_UTS).sum((1, 2))

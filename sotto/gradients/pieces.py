"""What one use of a parameter contributes to the per-unit gradients, in the cheapest form that is still exact.

A linear layer's gradient for one unit is `g^T a`: two thin matrices. An embedding's is a few rows. Keeping those forms
gives norms without ever building a gradient per unit ("ghost norms": Li et al. 2021, arXiv 2110.05679; the choice
between ghost and instantiation: Bu et al. 2022, arXiv 2210.00038).

Shape legend: see rows.py. V is the number of embedding rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sotto.gradients.rows import Rows

CHUNK = 1 << 24
"""Numbers held at once while gradients of single rows are added up into units."""


def wide(x: torch.Tensor) -> torch.Tensor:
    """Norms and sums are accumulated in float32 or better."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


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
    """Gradients themselves, already summed over each unit's rows: `grad_U` is (U, *parameter shape)."""

    grad_U: torch.Tensor

    def squared_norms(self, rows: Rows) -> torch.Tensor:
        return self.grad_U.flatten(1).square().sum(1)

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

    def instantiation_is_cheaper(self, rows: Rows) -> bool:
        """Compares p*d numbers per unit with T*(p+d): the same inequality decides arithmetic and bytes kept."""
        most = 1 if rows.slots_UK is None else rows.slots_UK.shape[1]
        length, d, p = self.a_BTd.shape[1] * most, self.a_BTd.shape[2], self.g_BTp.shape[2]
        return p * d <= length * (p + d)

    def squared_norms(self, rows: Rows) -> torch.Tensor:
        a, g = rows.concatenate(wide(self.a_BTd)), rows.concatenate(wide(self.g_BTp))
        if a.shape[1] == 1:
            return a.square().sum((1, 2)) * g.square().sum((1, 2))
        gram_a, gram_g = torch.bmm(a, a.transpose(1, 2)), torch.bmm(g, g.transpose(1, 2))
        size_U = (gram_a.diagonal(dim1=1, dim2=2) * gram_g.diagonal(dim1=1, dim2=2)).sqrt().sum(1)
        return never_too_small(gram_a.mul_(gram_g).sum((1, 2)), size_U)

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
        g = wide(self.g_BTd)
        dense = g.new_zeros((rows.num_units * self.num_embeddings, g.shape[2]))
        key = rows.unit_of_B[:, None] * self.num_embeddings + self.ids_BT
        return dense.index_add_(0, key.flatten(), g.flatten(0, 1)).view(rows.num_units, self.num_embeddings, -1)


Piece = Instantiated | Factored | Indexed


def squared_norms(pieces: list[Piece], rows: Rows) -> torch.Tensor:
    """(U,) squared norms of the *sum* of several uses of one parameter: a layer called twice, a tied embedding."""
    pieces = _merge(pieces)
    if len(pieces) == 1:
        return pieces[0].squared_norms(rows)
    kinds = {type(piece) for piece in pieces}
    if kinds == {Indexed, Factored}:
        indexed = next(p for p in pieces if isinstance(p, Indexed))
        factored = next(p for p in pieces if isinstance(p, Factored))
        if not factored.transposed:
            first, second = indexed.squared_norms(rows), factored.squared_norms(rows)
            cross = 2 * _tied_inner_product(indexed, factored, rows)
            return never_too_small(first + second + cross, first.sqrt() + second.sqrt())
    total = pieces[0].instantiate(rows)
    for piece in pieces[1:]:
        total = total + piece.instantiate(rows)
    return Instantiated(total).squared_norms(rows)


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Uses of the same form are one use with a longer T."""
    factored = [p for p in pieces if isinstance(p, Factored)]
    indexed = [p for p in pieces if isinstance(p, Indexed)]
    merged: list[Piece] = [p for p in pieces if isinstance(p, Instantiated)]
    if factored:
        flip = factored[0].transposed  # a matrix may be used as W here and as its transpose there: swap a and g
        a = torch.cat([p.a_BTd if p.transposed == flip else p.g_BTp for p in factored], 1)
        g = torch.cat([p.g_BTp if p.transposed == flip else p.a_BTd for p in factored], 1)
        merged.append(factored[0] if len(factored) == 1 else Factored(a, g, flip))
    if indexed:
        first = indexed[0]
        ids = torch.cat([p.ids_BT for p in indexed], 1)
        g = torch.cat([p.g_BTd for p in indexed], 1)
        merged.append(first if len(indexed) == 1 else Indexed(ids, g, first.num_embeddings, None))
    return merged


def _tied_inner_product(embedding: Indexed, head: Factored, rows: Rows) -> torch.Tensor:
    """<G_E, G_H> per unit, `sum_{t,s} g^H_s[x_t] (a^H_s . g^E_t)`, when one matrix embeds tokens and scores them."""
    a, g = rows.concatenate(wide(head.a_BTd)), rows.concatenate(wide(head.g_BTp))
    ids = rows.concatenate(embedding.ids_BT[..., None].double()).squeeze(-1).long()
    g_embedding = rows.concatenate(wide(embedding.g_BTd))
    similarity_UTS = torch.bmm(g_embedding, a.transpose(1, 2))
    picked_UTS = torch.gather(g.transpose(1, 2), 1, ids[..., None].expand(-1, -1, g.shape[1]))
    return (similarity_UTS * picked_UTS).sum((1, 2))

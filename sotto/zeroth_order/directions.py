"""Directions: where the loss is probed. Public, and a function of (run key, step, k, tensor name, element) alone.

`Directions` holds no direction. It makes any part of one when it is asked: a whole tensor, a slice of its flat
elements, a few rows of a table. All parts agree to the last bit with the whole, on every device and under every
sharding, because the words come from a counter (`counter`) and the entries are made of integers (`laws`).

The laws, all with mean zero and E[u u^T] = I over the entries that are trained:

* `rademacher`: independent signs;
* `gaussian`: normal entries, with independent signs and sizes from a table (`laws`);
* `sphere`: a Gaussian direction scaled to length sqrt(d), as good as uniform on the sphere (Zhang et al. 2024,
  arXiv:2310.09639, algorithm 2). Its length is added up in integers, so every shard scales by the same float;
* `orthogonal`: one random sign vector times rows of a Walsh-Hadamard matrix of at least d columns, K rows in a step and
  other rows in the next, until none are left: then comes another sign vector. So steps do not look where others have
  looked, and as many directions as there are rows see every dimension. Each direction alone is a `rademacher` one.
  The K of a step are orthogonal to one another exactly where K, rounded up to a power of two, divides the size of
  every tensor; each tensor that is not so adds at most that number to a product of two directions of length sqrt(d).
  Those of different steps are orthogonal exactly where d is a power of two, and nearly elsewhere.

`rank` > 0 replaces the direction of every matrix by U V^T / sqrt(rank), U and V drawn apart, with entries of the law
(as LOZO, Chen et al. 2024, arXiv:2410.07698); the covariance of the matrix' entries is still the identity. A mask keeps
the named entries and drops all others, as sparse zeroth-order methods do; it must not depend on private data.

The first axis of a tensor in `classes` runs over classes whose scores go into a softmax. A number that is added to all
scores changes no loss, so every gradient adds up to zero over the classes, and so do the directions: none is spent on
what cannot matter, which for two classes is half of all dimensions.

Shape legend: e flat elements of a tensor, n rows, m and c rows and columns of a matrix, r rank, K directions of a step,
C classes, x all other axes.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from sotto.zeroth_order import kernels, laws, processor, walsh
from sotto.zeroth_order.entries import Entries, chunk_on
from sotto.zeroth_order.law import Law, bad_argument, is_count
from sotto.zeroth_order.parts import split_in_order


def new_key() -> str:
    """A fresh run key, 128 bits in hexadecimal. It is public, and no noise is ever drawn from it."""
    return secrets.token_hex(16)


class Directions:
    """The directions of a run, made on demand.

    Attributes:
      key: the run key, public.
      shapes: tensor name -> shape, of everything that is perturbed.
      count: K, the number of directions in a step.
      masks: tensor name -> bool tensor of its shape, or absent where all entries are perturbed.
      classes: names of tensors whose directions add up to zero over the first axis.
      centred: whether the loss is taken on one side of each direction, and compared with the mean over the K of them
        (`probes`); else on both sides.
      parts: into how many parts the tensors are split (`parts`); a probe looks at one part alone.
      part: tensor name -> the number of its part.
      size: d, the number of dimensions in which the weights are moved.
    """

    def __init__(
        self,
        key: str,
        shapes: Mapping[str, torch.Size],
        count: int,
        law: Law | None = None,
        masks: Mapping[str, torch.Tensor] | None = None,
        classes: Collection[str] = (),
        centred: bool = False,
        parts: int = 1,
    ):
        """Sets up the directions; draws nothing.

        Raises:
          SottoError: SOT650, K is not a whole number of at least 1 (of at least 2 where `centred`), nothing is to be
            perturbed, a mask or a name in `classes` does not fit, or there are more parts than tensors.
        """
        if not is_count(count, 1):
            raise bad_argument("probes", count, "a step learns from at least one direction", "give a whole number >= 1")
        self.key, self.shapes, self.count, self.law = key, dict(shapes), count, law or Law()
        self.masks, self.classes, self.centred = dict(masks or {}), frozenset(classes), centred
        if centred and count < 2:
            why = "a loss is compared with the mean over the directions, and the mean of one is itself"
            raise bad_argument("probes", count, why, "give at least 2, or centred=False")
        self._check_masks()
        self._check_classes()
        self.size = sum(int(self.masks[n].sum()) if n in self.masks else self._drawn(n) for n in self.shapes)
        if self.size == 0:
            raise bad_argument("shapes", {}, "there is nothing to perturb", "make some parameters trainable")
        self.parts, self.part = parts, split_in_order({n: math.prod(s) for n, s in self.shapes.items()}, parts)
        self._lengths: dict[tuple[int, int], float] = {}
        self._rows = walsh.Rows(key, {n: self._drawn(n) for n in self.shapes}, count)
        self._made = Entries(key, self.law, self._rows)

    def _drawn(self, name: str) -> int:
        """Entries that are drawn for a tensor: those of one class follow from those of the others."""
        size = math.prod(self.shapes[name])
        return size - size // self.shapes[name][0] if name in self.classes else size

    def _check_classes(self) -> None:
        for name in self.classes:
            shape = self.shapes.get(name, torch.Size())
            if len(shape) == 0 or shape[0] < 2 or name in self.masks or self.is_low_rank(name):
                why = "directions that add up to zero over classes need an axis of two classes or more, and all entries"
                raise bad_argument("classes", name, why, "name tensors of that shape, with no mask and rank 0")

    def _check_masks(self) -> None:
        for name, mask in self.masks.items():
            if name not in self.shapes or mask.shape != self.shapes[name] or mask.dtype != torch.bool:
                why = "a mask says for every entry of one tensor whether it is perturbed"
                raise bad_argument(
                    f"mask of {name}", tuple(mask.shape), why, "give a bool tensor of the tensor's shape"
                )
            if self.is_low_rank(name):
                why = "a matrix of low rank with entries taken out has no low rank"
                raise bad_argument(f"mask of {name}", tuple(mask.shape), why, "use rank 0 with a mask")

    @property
    def independent(self) -> int:
        """How many things the K numbers of a step say: centred ones add up to zero."""
        return self.count - self.centred

    @property
    def passes(self) -> int:
        """Forward passes of an example in a step."""
        return self.count if self.centred else 2 * self.count

    def is_low_rank(self, name: str) -> bool:
        return self.law.rank > 0 and len(self.shapes[name]) == 2

    @property
    def width(self) -> int:
        """How many numbers a step releases: K for each part."""
        return self.parts * self.count

    @property
    def root(self) -> float:
        """What a unit's derivatives are divided by, and its numbers again in an update: sqrt(independent / parts).

        Over sqrt(K) the numbers of a unit are as long as its gradient, on average. A unit that looks within one part,
        each being as likely, sees that part of the gradient alone; times the root of the number of parts its numbers
        are as long on average, over the choice of the part, and updates are right on average.
        """
        return math.sqrt(self.independent / self.parts)

    def part_for(self, step: int, unit: int) -> int:
        """The part that a unit looks at in a step: a function of public things, and not of who else takes part.

        Parts that were dealt out among those who were drawn would change for all of them with each one more, and so
        would the sum, by far more than the bound of one unit.
        """
        if self.parts == 1:
            return 0
        seed = hashlib.sha256(f"part/{self.key}/{step}/{unit}".encode()).digest()
        return int.from_bytes(seed, "little") % self.parts

    # ---- pieces of a direction

    def slice(
        self, name: str, step: int, k: int, start: int, stop: int, device: torch.device | None = None
    ) -> torch.Tensor:
        """Elements `start` to `stop` of the flat direction: (stop - start,) float32."""
        if self.is_low_rank(name):
            return self._low_rank_rows(name, step, k, start, stop, device)
        if name in self.classes:
            return self._over_classes(name, step, k, device).flatten()[start:stop]
        part = self._entries(name, "entry", step, k, start, stop, device)
        return self._finish(part, name, step, k, slice(start, stop))

    def add(
        self, name: str, step: int, k: int, factor: float, source_e: torch.Tensor, first: int, target_e: torch.Tensor,
        exact: bool = False,
    ) -> None:  # fmt: skip
        """target = source + factor * direction, of the flat elements of a tensor from number `first` on.

        Computed in float32 or better and rounded to the type of the target, which may be the source.

        Args:
          exact: the same bits on every device: the product is rounded, and then the sum.
        """
        stream, device = self.stream(name, step, k), target_e.device
        factor += 0.0  # of -0 a table that is kept (`laws`) would be that of 0, and the sign of a sum of zeros another
        if processor.add(stream, factor, source_e, first, target_e):
            return
        fused = exact and stream is not None and stream.places is not None  # whose products are not exact
        if not fused and kernels.add(stream, factor, source_e, first, target_e):
            return
        for start, stop, u in self.pieces(name, step, k, first, first + target_e.numel(), device):
            at = slice(start - first, stop - first)
            if exact:
                torch.add(source_e[at], u.to(target_e.dtype).mul_(factor), out=target_e[at])
            else:
                torch.add(source_e[at], u, alpha=factor, out=target_e[at])

    def pieces(
        self, name: str, step: int, k: int, start: int, stop: int, device: torch.device
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Elements `start` to `stop` in small parts: (first, last, elements), each good until the next is asked for."""
        stream = self.stream(name, step, k)
        if stream is not None and device.type == "cpu":
            yield from self._made.pieces(name, step, k, start, stop, stream.stretch)
            return
        chunk = chunk_on(device)
        for begin in range(start, stop, chunk):
            end = min(begin + chunk, stop)
            yield begin, end, self.slice(name, step, k, begin, end, device)

    def stream(self, name: str, step: int, k: int) -> walsh.Stream | None:
        """What a direction on a tensor follows from; None where it is more than its entries, or less."""
        if name in self.masks or name in self.classes or self.is_low_rank(name):
            return None
        stream = self._made.stream(name, "entry", step, k)
        return stream._replace(stretch=self.stretch(step, k)) if self.law.kind == "sphere" else stream

    def tensor(self, name: str, step: int, k: int, device: torch.device | None = None) -> torch.Tensor:
        """The direction of a whole tensor, in its shape. Training never makes one of these for a large tensor."""
        shape = self.shapes[name]
        return self.slice(name, step, k, 0, math.prod(shape), device).view(shape)

    def rows(self, name: str, step: int, k: int, rows_n: torch.Tensor) -> torch.Tensor:
        """Some rows of the direction of a matrix: (n,) int64 -> (n, c). What an embedding needs of a large table."""
        columns = self.shapes[name][1]
        if self.is_low_rank(name):
            u_mr, v_cr = self.factors(name, step, k, rows_n.device)
            return _product(u_mr[rows_n], v_cr)
        if name in self.classes:
            return self._over_classes(name, step, k, rows_n.device)[rows_n]
        return self._finish(self._made.rows(name, step, k, rows_n, columns), name, step, k, rows_n)

    def factors(
        self, name: str, step: int, k: int, device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(m, r) U and (c, r) V of the direction U V^T / sqrt(r) of a matrix; U is already divided by sqrt(r)."""
        (m, c), r = self.shapes[name], self.law.rank
        u_mr = self._entries(name, "left", step, k, 0, m * r, device).view(m, r)
        v_cr = self._entries(name, "right", step, k, 0, c * r, device).view(c, r)
        return u_mr * (1 / math.sqrt(r)), v_cr

    # ---- how they are made

    def _entries(
        self, name: str, role: str, step: int, k: int, start: int, stop: int, device: torch.device | None
    ) -> torch.Tensor:
        return self._made.flat(name, role, step, k, start, stop, device or torch.device("cpu"))

    def _finish(self, part: torch.Tensor, name: str, step: int, k: int, where: Any) -> torch.Tensor:
        """Applies the mask and the length of the sphere; `where` selects from the flat mask, or rows of the mask."""
        mask = self.masks.get(name)
        if mask is not None:
            if not isinstance(where, slice):
                where = where.to(mask.device)
            part *= (mask.flatten() if isinstance(where, slice) else mask)[where].to(part.device)
        if self.law.kind == "sphere":
            part *= self.stretch(step, k)
        return part

    def _over_classes(self, name: str, step: int, k: int, device: torch.device | None) -> torch.Tensor:
        """A whole tensor from entries for one class less: their combination with Helmert's contrasts, an orthonormal
        basis of what adds up to zero. Added up from the last class to the first, in one order on every device."""
        shape = self.shapes[name]
        drawn = self._entries(name, "entry", step, k, 0, self._drawn(name), device).view(shape[0] - 1, *shape[1:])
        out_Cx, later_x = drawn.new_empty(shape), drawn.new_zeros(shape[1:])
        for i in range(shape[0] - 1, 0, -1):
            part = drawn[i - 1].mul(1 / math.sqrt(i * (i + 1)))
            out_Cx[i] = later_x.sub(part.mul(float(i)))
            later_x = later_x.add(part)
        out_Cx[0] = later_x
        return out_Cx.mul_(self.stretch(step, k)) if self.law.kind == "sphere" else out_Cx

    def _low_rank_rows(
        self, name: str, step: int, k: int, start: int, stop: int, device: torch.device | None
    ) -> torch.Tensor:
        columns = self.shapes[name][1]
        u_mr, v_cr = self.factors(name, step, k, device)
        first = start // columns
        return _product(u_mr[first : -(-stop // columns)], v_cr).flatten()[start - first * columns :][: stop - start]

    def stretch(self, step: int, k: int) -> float:
        """What a Gaussian direction is multiplied with to have length sqrt(d). Exact up to one rounding."""
        if (step, k) not in self._lengths:
            if len(self._lengths) > 4 * self.count:
                self._lengths.clear()
            squares = sum(self._squares(name, step, k) for name in self.shapes)
            self._lengths[step, k] = math.sqrt(self.size / (squares * laws.SCALE**2))
        return self._lengths[step, k]

    def _squares(self, name: str, step: int, k: int) -> int:
        """Sum of squares of a tensor's entries in units of SCALE^2, in integers of any size."""
        size, mask = self._drawn(name), self.masks.get(name)
        if mask is None:
            return self._made.squares(name, step, k, size)
        total = 0
        for start, stop, part in self._made.pieces(name, step, k, 0, size):
            whole = (part * mask.flatten()[start:stop].cpu()).double().mul_(1 / laws.SCALE).long()
            # Squares are below 2^46 and a part has 2^17 of them, but their mean is 2^40: this cannot overflow.
            total += int((whole * whole).sum())
        return total

    # ---- for the record

    def spec(self) -> dict[str, Any]:
        """All that is needed to make the same directions again, for JSON. Masks are named by their hash."""
        spec = {
            "key": self.key,
            "law": self.law.kind,
            "rank": self.law.rank,
            "probes": self.count,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "masks": {name: _mask_hash(mask) for name, mask in self.masks.items()},
            "classes": sorted(self.classes),
            "centred": self.centred,
            "rows": self._rows.count if self.law.kind == "orthogonal" else 0,
        }
        if self.law.entries == "gaussian":
            spec["run"] = laws.RUN  # not in the record of signs, of which older logs stay good
        return spec if self.parts == 1 else {**spec, "parts": self.parts}


def _product(u_nr: torch.Tensor, v_cr: torch.Tensor) -> torch.Tensor:
    """U V^T, added up in one order on every device."""
    out = u_nr.new_zeros(u_nr.shape[0], v_cr.shape[0])
    for j in range(u_nr.shape[1]):
        out += u_nr[:, j, None] * v_cr[:, j]
    return out


def _mask_hash(mask: torch.Tensor) -> str:
    return hashlib.sha256(np.packbits(mask.flatten().cpu().numpy()).tobytes()).hexdigest()

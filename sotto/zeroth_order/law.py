"""The law of directions, as a configuration names it. What each law is, is in `directions`."""

from __future__ import annotations

from dataclasses import dataclass

from sotto.errors import SottoError, did_you_mean

LAWS = ("rademacher", "gaussian", "sphere", "orthogonal")


def bad_argument(name: str, value: object, why: str, fix: str) -> SottoError:
    return SottoError("SOT650", what=f"{name} is {value!r}", where=name, why=why, fix=fix)


@dataclass(frozen=True)
class Law:
    """How the directions of a run are drawn.

    Attributes:
      kind: one of `LAWS`.
      rank: 0 for directions whose entries are drawn one by one, else the rank of the directions of matrices.
    """

    kind: str = "rademacher"
    rank: int = 0

    def __post_init__(self) -> None:
        if self.kind not in LAWS:
            fix = f"use one of {', '.join(LAWS)}." + did_you_mean(str(self.kind), LAWS)
            raise bad_argument("law", self.kind, "no such law of directions is known", fix)
        if not is_count(self.rank, 0):
            raise bad_argument("rank", self.rank, "it is the rank of a matrix", "give a whole number >= 0")
        if self.rank and self.kind in ("sphere", "orthogonal"):
            why = "a product of two factors has neither a fixed length nor a fixed angle to another one"
            raise bad_argument("rank", self.rank, why, "use rank 0, or law rademacher or gaussian")

    @property
    def entries(self) -> str:
        """The law of the entries before they are scaled or combined: gaussian or rademacher, as in `laws`."""
        return "gaussian" if self.kind in ("gaussian", "sphere") else "rademacher"


def is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

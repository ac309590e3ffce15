"""Facts about what was released. Accounting works on these, never on side effects.

An event is frozen and JSON-serialisable, so the ledger can keep it and anyone can account for it again with other
software. An unknown kind is refused: a ledger written by a newer version must not be under-counted by an older one.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sotto.errors import SottoError, did_you_mean

RELATIONS = ("add_or_remove_one", "replace_one")


def dp_accounting(module: str = "") -> Any:
    """The library dp_accounting (or a module of it), imported on first use: it takes half a second. It is untyped."""
    return importlib.import_module("dp_accounting" + module)


def check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> float:
    """Returns `value` as a float if it is a finite number in the given range, else raises SOT401."""
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if math.isfinite(number) and above < number < below and at_least <= number <= at_most:
        return number
    limits = ((">", above), (">=", at_least), ("<", below), ("<=", at_most))
    rule = " and ".join(f"{sign} {limit:g}" for sign, limit in limits if math.isfinite(limit))
    raise SottoError(
        "SOT401",
        what=f"{name} is {value!r}",
        where=name,
        why="the privacy guarantee is computed from this number",
        fix=f"give a finite number {rule}".rstrip(),
    )


def check_count(name: str, value: object, *, at_least: int = 0) -> int:
    """Returns `value` if it is a whole number of at least `at_least`, else raises SOT401."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= at_least:
        return value
    raise SottoError(
        "SOT401",
        what=f"{name} is {value!r}",
        where=name,
        why="the privacy guarantee is computed from this number",
        fix=f"give a whole number >= {at_least}",
    )


def check_relation(value: object) -> str:
    if isinstance(value, str) and value in RELATIONS:
        return value
    raise SottoError(
        "SOT401",
        what=f"neighboring_relation is {value!r}",
        where="neighboring_relation",
        why="epsilon has no meaning without the pairs of datasets it compares",
        fix=f"use one of {', '.join(RELATIONS)}." + did_you_mean(str(value), RELATIONS),
    )


@dataclass(frozen=True)
class _Fact:
    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Gaussian(_Fact):
    """Gaussian noise on a sum in which every unit takes part.

    Attributes:
      noise_multiplier: standard deviation of the noise over the L2 sensitivity to adding or removing one unit.
    """

    kind: ClassVar[str] = "gaussian"
    noise_multiplier: float

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, at_least=0)

    def to_dp_event(self) -> Any:
        return dp_accounting().GaussianDpEvent(self.noise_multiplier)


@dataclass(frozen=True)
class PoissonGaussian(_Fact):
    """One DP-SGD step: each unit takes part with `sampling_prob`, independently; Gaussian noise on the clipped sum.

    Attributes:
      noise_multiplier: standard deviation of the noise over the L2 sensitivity to adding or removing one unit.
      sampling_prob: in (0, 1].
    """

    kind: ClassVar[str] = "poisson_gaussian"
    noise_multiplier: float
    sampling_prob: float

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, at_least=0)
        check_number("sampling_prob", self.sampling_prob, above=0, at_most=1)

    def to_dp_event(self) -> Any:
        return dp_accounting().PoissonSampledDpEvent(
            self.sampling_prob, dp_accounting().GaussianDpEvent(self.noise_multiplier)
        )


@dataclass(frozen=True)
class Laplace(_Fact):
    """Laplace noise on a sum in which every unit takes part. Only for add_or_remove_one.

    Attributes:
      noise_multiplier: scale of the Laplace distribution over the L1 sensitivity.
    """

    kind: ClassVar[str] = "laplace"
    noise_multiplier: float

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, at_least=0)

    @property
    def pure_epsilon(self) -> float:
        """The epsilon at delta 0."""
        return 1 / self.noise_multiplier if self.noise_multiplier else math.inf

    def to_dp_event(self) -> Any:
        return dp_accounting().LaplaceDpEvent(self.noise_multiplier)


@dataclass(frozen=True)
class PoissonLaplace(_Fact):
    """Each unit takes part with `sampling_prob`, independently; Laplace noise on the sum. Only for add_or_remove_one.

    Attributes:
      noise_multiplier: scale of the Laplace distribution over the L1 sensitivity.
      sampling_prob: in (0, 1].
    """

    kind: ClassVar[str] = "poisson_laplace"
    noise_multiplier: float
    sampling_prob: float

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, at_least=0)
        check_number("sampling_prob", self.sampling_prob, above=0, at_most=1)

    @property
    def pure_epsilon(self) -> float:
        """The epsilon at delta 0: log(1 + q (e^(1/b) - 1)).

        A density with the unit is at most (1 - q) + q e^(1/b) times the one without it, and at least 1 over that: the
        second by 1 - q + q e^(-x) >= 1 / (1 - q + q e^x), which is Jensen's inequality for 1/y.
        """
        x = 1 / self.noise_multiplier if self.noise_multiplier else math.inf
        if x > 700:
            return x  # sampling never hurts
        return math.log1p(self.sampling_prob * math.expm1(x))

    def to_dp_event(self) -> Any:
        return dp_accounting().PoissonSampledDpEvent(
            self.sampling_prob, dp_accounting().LaplaceDpEvent(self.noise_multiplier)
        )


Event = PoissonGaussian | Gaussian | Laplace | PoissonLaplace
_KINDS: dict[str, type[PoissonGaussian] | type[Gaussian] | type[Laplace] | type[PoissonLaplace]] = {
    PoissonGaussian.kind: PoissonGaussian,
    Gaussian.kind: Gaussian,
    Laplace.kind: Laplace,
    PoissonLaplace.kind: PoissonLaplace,
}


def event_from_dict(values: Mapping[str, Any]) -> Event:
    """Rebuilds an event from `to_dict`.

    Raises:
      SottoError: SOT402, the kind is unknown or the fields are not exactly those of the kind.
    """
    fields = dict(values)
    kind = fields.pop("kind", None)
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is not None and set(fields) == {f.name for f in dataclasses.fields(cls)}:
        return cls(**fields)
    raise SottoError(
        "SOT402",
        what=f"unknown privacy event {dict(values)!r}",
        why="what this version of Sotto does not know, it cannot count, and skipping it would under-state epsilon",
        fix=f"upgrade Sotto; this version knows: {', '.join(sorted(_KINDS))}",
    )

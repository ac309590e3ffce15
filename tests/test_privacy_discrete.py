"""Exact noise on integers: its law, decided by walking through all random choices, and by counting many draws."""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from scipy import stats

from sotto.errors import SottoError
from sotto.privacy import discrete

TOO_UNLIKELY = 1e-6
Below = discrete.Below


# ---- by all random choices: exact probabilities, without a sample


class _Branch(Exception):
    """The script of a walk has ended, at a choice with these weights."""


class _Restart(Exception):
    """A rejected draw begins again. All attempts are alike, so the law is that of one attempt that was not rejected."""


class Walk:
    """One way through all random choices of a draw."""

    def __init__(self, script: tuple[int, ...]):
        self.script, self.place, self.weight, self.begun = script, 0, 1.0, False

    def choose(self, weights: list[float]) -> int:
        if self.place == len(self.script):
            raise _Branch(weights)
        chosen = self.script[self.place]
        self.place += 1
        self.weight *= weights[chosen]
        return chosen

    def begin(self) -> None:
        """Called where an attempt begins."""
        if self.begun:
            raise _Restart
        self.begun = True

    def coin(self, exponent: Fraction, below: Below) -> bool:
        """A coin of the right probability, in the place of `coin_exp`, which has a test of its own."""
        return self.choose([math.exp(-exponent), -math.expm1(-exponent)]) == 0


class Undecided:
    """A uniform integer below n of which nothing is known but how a comparison came out."""

    def __init__(self, walk: Walk, n: int):
        self.walk, self.n = walk, n

    def __lt__(self, m: int) -> bool:
        return self.walk.choose([m / self.n, 1 - m / self.n]) == 0


def weights(draw: Callable[[Walk], int], least: float = 1e-12) -> dict[int, float]:
    """The weight of each result of one attempt, over all ways whose weight is at least `least`."""
    found: dict[int, float] = {}
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        walk = Walk(waiting.pop())
        try:
            result = draw(walk)
        except _Restart:
            continue
        except _Branch as branch:
            choices = enumerate(branch.args[0])
            waiting += [(*walk.script, i) for i, weight in choices if walk.weight * weight >= least]
            continue
        found[result] = found.get(result, 0.0) + walk.weight
    return found


def law(draw: Callable[[Walk], int], least: float = 1e-12) -> dict[int, float]:
    """The probability of each result."""
    found = weights(draw, least)
    total = math.fsum(found.values())
    return {result: weight / total for result, weight in found.items()}


def assert_law(found: dict[int, float], pmf: Callable[[int], float], tolerance: float = 1e-9) -> None:
    assert math.fsum(pmf(x) for x in found) == pytest.approx(1.0, abs=10 * tolerance)
    for x, weight in found.items():
        assert weight == pytest.approx(pmf(x), abs=tolerance), x


def gaussian(std: float) -> Callable[[int], float]:
    """The exact probabilities, normalised over all integers that matter."""
    reach = math.ceil(40 * std) + 2
    total = math.fsum(math.exp(-x * x / (2 * std * std)) for x in range(-reach, reach + 1))
    return lambda x: math.exp(-x * x / (2 * std * std)) / total


def laplace(scale: int) -> Callable[[int], float]:
    half = math.exp(-1 / scale)
    return lambda x: (1 - half) / (1 + half) * half ** abs(x)


EXPONENTS = [Fraction(0), Fraction(1, 3), Fraction(1, 2), Fraction(1), Fraction(3, 2), Fraction(2), Fraction(17, 4)]


@pytest.mark.parametrize("exponent", EXPONENTS, ids=str)
def test_coins(exponent: Fraction) -> None:
    found = law(lambda walk: discrete.coin_exp(exponent, lambda n: Undecided(walk, n)))  # type: ignore[arg-type,return-value]
    exact = math.exp(-exponent)
    assert_law(found, lambda x: exact if x else 1 - exact)
    if exponent:
        with pytest.raises(AssertionError):
            assert_law(found, lambda x: exact * (1 + 1e-6) if x else 1 - exact * (1 + 1e-6))


def one_laplace(walk: Walk, scale: int, patch: pytest.MonkeyPatch) -> int:
    def below(n: int) -> int:
        if n == scale:
            walk.begin()
        return walk.choose([1 / n] * n)

    patch.setattr(discrete, "coin_exp", walk.coin)
    return discrete.discrete_laplace(scale, below)


@pytest.mark.parametrize("scale", [1, 3, 4, 13])
def test_two_sided_geometric(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = law(lambda walk: one_laplace(walk, scale, monkeypatch))
    assert_law(found, laplace(scale))
    with pytest.raises(AssertionError):
        assert_law(found, laplace(scale + 1))


def one_floored(walk: Walk, scale: int, patch: pytest.MonkeyPatch) -> int:
    def below(n: int) -> int:
        if n == scale:
            walk.begin()
        return walk.choose([1 / n] * n)

    patch.setattr(discrete, "coin_exp", walk.coin)
    return discrete.floored_laplace(scale, below)


def floored(scale: int) -> Callable[[int], float]:
    """The mass of the Laplace distribution in [x, x + 1), from its distribution function."""

    def below(x: float) -> float:
        return 0.5 * math.exp(x / scale) if x < 0 else 1 - 0.5 * math.exp(-x / scale)

    return lambda x: below(x + 1) - below(x)


@pytest.mark.parametrize("scale", [1, 3, 4, 13])
def test_a_laplace_draw_rounded_down(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = law(lambda walk: one_floored(walk, scale, monkeypatch))
    assert_law(found, floored(scale))
    for wrong in (floored(scale + 1), laplace(scale)):
        with pytest.raises(AssertionError):
            assert_law(found, wrong)


def one_gaussian(walk: Walk, std: Fraction, patch: pytest.MonkeyPatch) -> int:
    def draw(scale: int, below: Below) -> int:
        walk.begin()
        reach = 30 * scale
        return walk.choose([laplace(scale)(x) for x in range(-reach, reach + 1)]) - reach

    patch.setattr(discrete, "coin_exp", walk.coin)
    patch.setattr(discrete, "discrete_laplace", draw)
    return discrete.discrete_gaussian(std)


@pytest.mark.parametrize("std", [Fraction(1, 3), Fraction(1), Fraction(3, 2), Fraction(37, 11), Fraction(12)], ids=str)
def test_gaussian(std: Fraction, monkeypatch: pytest.MonkeyPatch) -> None:
    found = law(lambda walk: one_gaussian(walk, std, monkeypatch))
    assert_law(found, gaussian(float(std)))
    for wrong in (0.999, 1.001):
        with pytest.raises(AssertionError):
            assert_law(found, gaussian(float(std) * wrong))


# ---- the rounded Gaussian, part by part


class Fixed:
    """A real number that is known, in the place of one that is drawn digit by digit."""

    def __init__(self, walk: Walk, value: float):
        self.walk, self.value = walk, value

    def exceeds_another(self) -> bool:
        return self.walk.choose([self.value, 1 - self.value]) == 0


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("x", [0.0, 0.3, 0.8])
def test_coins_of_real_probability(k: int, x: float) -> None:
    parts = [range(1), range(1, 2 * k), range(2 * k, 2 * k + 1), range(2 * k + 1, 100)]
    """Integers between which the coin makes no difference: one stands for all."""

    def coin(walk: Walk) -> bool:
        def below(n: int) -> int:
            sizes = [len(range(part.start, min(part.stop, n))) for part in parts[k == 0 :]]
            return parts[k == 0 :][walk.choose([size / n for size in sizes])].start

        real: Any = Fixed(walk, x)
        return discrete._coin_exp_real(k, real, below)

    exact = math.exp(-x * (2 * k + x) / (2 * k + 2))
    found = law(coin, 1e-10)
    assert_law(found, lambda result: exact if result else 1 - exact, 1e-6)
    if x:
        with pytest.raises(AssertionError):
            assert_law(found, lambda result: exact * 0.999 if result else 1 - exact * 0.999, 1e-6)


def test_the_whole_part_of_a_half_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole_part(walk: Walk) -> int:
        counting, asked = False, 0

        def coin_exp(exponent: Fraction, below: Below) -> bool:
            nonlocal counting
            if exponent == Fraction(1, 2) and not counting:
                walk.begin()
            counting = exponent == Fraction(1, 2)
            return walk.coin(exponent, below)

        def coin_exp_real(k: int, *_: object) -> bool:
            """All k + 1 coins in the first, with the probability that they have together on average over x."""
            nonlocal asked
            asked += 1
            mean = math.exp(k * k / 2) * math.sqrt(2 * math.pi) * float(stats.norm.sf(k) - stats.norm.sf(k + 1))
            return asked > 1 or walk.choose([mean, 1 - mean]) == 0

        monkeypatch.setattr(discrete, "coin_exp", coin_exp)
        monkeypatch.setattr(discrete, "_coin_exp_real", coin_exp_real)
        return discrete.half_normal()[0]

    found = law(whole_part)
    assert_law(found, lambda k: 2 * float(stats.norm.sf(k) - stats.norm.sf(k + 1)))
    with pytest.raises(AssertionError):
        assert_law(found, lambda k: 2 * float(stats.norm.sf(1.01 * k) - stats.norm.sf(1.01 * (k + 1))))


@pytest.mark.parametrize("digits", [(1,), (0,), (1, 0, 1, 1), (0, 0, 0, 1)])
def test_reals_are_compared_digit_by_digit(digits: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With binary digits, so that all can be walked through: the last ones are drawn on the way."""
    monkeypatch.setattr(discrete, "_DIGIT", 2)

    def exceeds(walk: Walk) -> bool:
        real = discrete.UniformReal(lambda n: walk.choose([1 / n] * n))
        real._digits += digits
        monkeypatch.setattr(real, "lengthen", undecided)
        return real.exceeds_another()

    def undecided() -> None:
        raise _Restart

    real = discrete.UniformReal(lambda n: 0)
    real._digits += digits
    low, high = real.interval()
    assert high - low == Fraction(1, 2 ** len(digits))
    # The other number is below the interval, above it, or inside, where new digits of both decide with even chances.
    assert weights(exceeds) == {result: w for result, w in ((True, low), (False, 1 - high)) if w}
    even = weights(lambda walk: first_digit(walk, monkeypatch))
    assert even[True] == even[False] == 0.25


def first_digit(walk: Walk, patch: pytest.MonkeyPatch) -> bool:
    """Compares two numbers of which nothing is known, by their first digits."""
    real = discrete.UniformReal(lambda n: walk.choose([1 / n] * n))
    draw = real.lengthen

    def once() -> None:
        walk.begin()
        draw()

    patch.setattr(real, "lengthen", once)
    return real.exceeds_another()


@pytest.mark.parametrize("std", [Fraction(1, 3), Fraction(7, 5), Fraction(10)], ids=str)
def test_the_nearest_integer_of_a_known_draw(std: Fraction, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(3)
    for _ in range(200):
        digits = [generator.randrange(4) for _ in range(60)]
        whole, sign = generator.randrange(4), generator.randrange(2)
        rest = iter(digits)
        real = discrete.UniformReal(lambda n, rest=rest: next(rest))
        monkeypatch.setattr(discrete, "_DIGIT", 4)
        monkeypatch.setattr(discrete, "half_normal", lambda below, known=(whole, real): known)
        exact = std * (whole + sum(Fraction(d, 4**place) for place, d in enumerate(digits, 1)))
        expected = math.floor(exact + Fraction(1, 2)) * (-1 if sign else 1)
        assert discrete.rounded_gaussian(std, lambda n, sign=sign: sign) == expected


# ---- by counting


def rounded(std: float) -> Callable[[int], float]:
    return lambda x: float(stats.norm.sf((abs(x) - 0.5) / std) - stats.norm.sf((abs(x) + 0.5) / std))


LAWS: dict[str, tuple[Callable[..., int], Callable[[float], Callable[[int], float]]]] = {
    "discrete": (lambda *args: discrete.discrete_gaussian(*args), gaussian),
    "rounded": (lambda *args: discrete.rounded_gaussian(*args), rounded),
}


def check_sample(draws: list[int], pmf: Callable[[int], float], std: float) -> None:
    """Raises AssertionError unless the draws look like the law. False alarms: about 3e-6."""
    n, found = len(draws), collections.Counter(draws)
    reach = max((x for x in range(math.ceil(12 * std) + 2) if n * pmf(x) >= 10), default=0)
    counts = [found[x] for x in range(-reach, reach + 1)]
    expected = [n * pmf(x) for x in range(-reach, reach + 1)]
    counts.append(n - sum(counts))
    expected.append(max(n - math.fsum(expected), 1.0))
    assert stats.chisquare(counts, expected, sum_check=False).pvalue > TOO_UNLIKELY
    around = range(-math.ceil(40 * std) - 1, math.ceil(40 * std) + 2)
    variance = math.fsum(x * x * pmf(x) for x in around)
    fourth = math.fsum(x**4 * pmf(x) for x in around)
    limit = float(stats.norm.isf(TOO_UNLIKELY / 2))
    assert abs(sum(draws)) < limit * math.sqrt(n * variance)
    assert abs(sum(x * x for x in draws) / n - variance) < limit * math.sqrt((fourth - variance**2) / n)


SAMPLED = [Fraction(3, 10), Fraction(1), Fraction(22, 7), Fraction(12.5), Fraction(5.123456789)]


@pytest.mark.parametrize("std", SAMPLED, ids=lambda f: f"{float(f):.3g}")
@pytest.mark.parametrize("name", LAWS)
def test_draws(name: str, std: Fraction) -> None:
    draw, pmf = LAWS[name]
    generator = random.Random(7)
    draws = [draw(std, generator.randrange) for _ in range(20_000)]
    check_sample(draws, pmf(float(std)), float(std))
    for wrong in (0.9, 1.1):
        with pytest.raises(AssertionError):
            check_sample(draws, pmf(float(std) * wrong), float(std) * wrong)


def test_the_check_tells_the_two_laws_apart_and_notices_a_shift() -> None:
    generator = random.Random(8)
    for name, other in (("discrete", "rounded"), ("rounded", "discrete")):
        draws = [LAWS[name][0](Fraction(1), generator.randrange) for _ in range(20_000)]
        check_sample(draws, LAWS[name][1](1.0), 1.0)
        with pytest.raises(AssertionError):  # a rounded Gaussian has a twelfth more variance
            check_sample(draws, LAWS[other][1](1.0), 1.0)
        with pytest.raises(AssertionError):
            check_sample([x + (i % 16 == 0) for i, x in enumerate(draws)], LAWS[name][1](1.0), 1.0)


@pytest.mark.parametrize("std", [0.2, 0.5, 1.0, 3.0])
def test_the_variance_is_at_most_that_of_the_gaussian(std: float) -> None:
    """Corollary 9 of the paper: what is added is no more than what is accounted for, and hardly less."""
    pmf = gaussian(std)
    variance = math.fsum(x * x * pmf(x) for x in range(-200, 201))
    assert variance <= std**2 * (1 + 1e-12)
    if std >= 1:
        assert variance == pytest.approx(std**2, rel=3e-7)


@pytest.mark.parametrize("std", [0.7, 2.0, 5.0])
@pytest.mark.parametrize("order", [1.5, 2.0, 8.0, 40.0])
def test_renyi_divergence_is_at_most_that_of_the_gaussian(std: float, order: float) -> None:
    """What accounting relies on, computed from the probabilities themselves, for a count that moves by 1."""
    pmf = gaussian(std)
    reach = range(-math.ceil(30 * std) - math.ceil(order), math.ceil(30 * std) + math.ceil(order) + 1)
    logs = [(order * -((x - 1) ** 2) + (order - 1) * x * x) / (2 * std * std) for x in reach]
    top = max(logs)
    log_moment = top + math.log(math.fsum(math.exp(value - top) for value in logs)) + math.log(pmf(0))
    assert log_moment / (order - 1) <= order / (2 * std * std) * (1 + 1e-9)


# ---- what is released

RELEASES = [lambda *args: discrete.add_discrete_gaussian(*args), lambda *args: discrete.add_rounded_gaussian(*args)]
either = pytest.mark.parametrize("release", RELEASES, ids=["discrete", "rounded"])


@either
def test_counts_of_any_size_and_sign(release: Callable[..., tuple[int, ...]]) -> None:
    counts = (0, -5, 3, 10**30)
    noisy = release(counts, 2.5)
    assert all(type(x) is int for x in noisy)
    assert all(abs(ours - theirs) < 2.5 * 40 for ours, theirs in zip(noisy, counts, strict=True))
    assert release((), 1.0) == ()
    assert release([7] * 20, 1e-3) == (7,) * 20, "noise of almost nothing is zero"
    wide = release([0] * 50, 1e12)
    assert len(set(wide)) == 50
    assert max(map(abs, wide)) > 1e11


@either
def test_draws_are_fresh_and_come_from_the_system(release: Callable[..., tuple[int, ...]]) -> None:
    results = set()
    for _ in range(3):
        random.seed(0)
        results.add(release([0] * 20, 1e6))
    assert len(results) == 3
    state = random.getstate()
    release([0] * 20, 1e6)
    assert random.getstate() == state
    for function in (discrete.add_discrete_gaussian, discrete.add_rounded_gaussian):
        assert function.__defaults__ == (discrete.secrets.randbelow,)


@either
def test_the_counts_do_not_enter_the_noise(release: Callable[..., tuple[int, ...]]) -> None:
    one, two = random.Random(3), random.Random(3)
    few, many = (5, 6, 7), (1000, -6, 10**20)
    here, there = release(few, 9.0, one.randrange), release(many, 9.0, two.randrange)
    assert [a - b for a, b in zip(here, few, strict=True)] == [a - b for a, b in zip(there, many, strict=True)]
    assert one.getstate() == two.getstate()


@either
@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf"), Fraction(0), Fraction(-1, 2)])
def test_deviations_that_are_none(std: float | Fraction, release: Callable[..., tuple[int, ...]]) -> None:
    with pytest.raises(SottoError, match="SOT401"):
        release([1], std)


@either
@pytest.mark.parametrize("count", [1.0, "1", None])
def test_counts_that_are_none(count: object, release: Callable[..., tuple[int, ...]]) -> None:
    with pytest.raises(TypeError):
        release([count], 1.0)

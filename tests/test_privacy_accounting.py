"""Every epsilon is an upper bound, tight to 0.1 %; every noise multiplier is enough, tight to 0.1 %."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sotto.errors import SottoError
from sotto.privacy import accounting, bounds
from sotto.privacy.accounting import Gaussian, Laplace, PoissonGaussian, PoissonLaplace

GOLDEN = json.loads((Path(__file__).parent / "golden" / "accounting.json").read_text())
TIGHT = 1e-3
few = settings(max_examples=6, deadline=None, derandomize=True)
sigmas = st.floats(0.5, 6.0)
probs = st.floats(0.002, 0.6)
counts = st.integers(1, 3000)
deltas = st.sampled_from([1e-4, 1e-5, 1e-6, 1e-8])
relations = st.sampled_from(["add_or_remove_one", "replace_one"])


def arguments(row: dict) -> tuple[float, float, int, float]:
    return row["noise_multiplier"], row["sampling_prob"], row["steps"], row["delta"]


def assert_upper(value: float, truth: float, tight: float = TIGHT) -> None:
    assert truth - 1e-9 <= value <= truth * (1 + tight) + 1e-9


@pytest.mark.parametrize(
    "row", GOLDEN["poisson_gaussian"], ids=lambda r: f"{r['name']}-{r['neighboring_relation'][:3]}"
)
def test_poisson_gaussian(row):
    value = accounting.epsilon(*arguments(row), row["neighboring_relation"])
    assert_upper(value, row["truth"])
    coarse = accounting.epsilon(*arguments(row), row["neighboring_relation"], precision="coarse")
    assert_upper(coarse, row["truth"], 1e-2)
    if "pld" in row:
        assert value == pytest.approx(row["pld"], rel=TIGHT)
    if "rdp" in row:
        rdp = accounting.epsilon(*arguments(row), accountant="rdp")
        assert rdp == pytest.approx(row["rdp"], rel=1e-3)
        assert rdp > value


def test_a_mutant_that_under_reports_is_caught():
    row = next(r for r in GOLDEN["poisson_gaussian"] if r["name"] == "opacus_prv")
    for too_low in (6.59982, row["truth"] * 0.999, row["truth"] - 1e-6):
        with pytest.raises(AssertionError):
            assert_upper(too_low, row["truth"])


@pytest.mark.parametrize("row", GOLDEN["one_step"])
def test_one_step_closed_form(row):
    value = accounting.epsilon(row["noise_multiplier"], row["sampling_prob"], 1, row["delta"])
    assert row["epsilon"] - 1e-6 <= value <= row["epsilon"] * (1 + TIGHT)


def test_composition_of_three_steps():
    row = GOLDEN["subsampled_three_steps"]
    value = accounting.epsilon(row["noise_multiplier"], row["sampling_prob"], row["steps"], row["delta"])
    assert value == pytest.approx(row["epsilon"], rel=TIGHT)


def test_gaussian_closed_form_both_ways():
    table, noise = dict(GOLDEN["gaussian_mu_to_epsilon"]), dict(GOLDEN["gaussian_noise_for_epsilon"])
    for delta_index, delta in enumerate(table.pop("delta")):
        for mu, values in table.items():
            assert accounting.epsilon(1 / float(mu), 1.0, 1, delta) == pytest.approx(values[delta_index], rel=1e-7)
            assert accounting.gdp_mu(values[delta_index], delta) == pytest.approx(float(mu), rel=1e-6)
    for delta_index, delta in enumerate(noise.pop("delta")):
        for target, values in noise.items():
            sigma = accounting.noise_multiplier(float(target), 1.0, 1, delta)
            assert sigma == pytest.approx(values[delta_index], rel=1e-7)
            assert accounting.epsilon(sigma, 1.0, 1, delta) <= float(target)


def test_closed_form_agrees_with_dp_accounting():
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    for mu in (0.01, 0.3, 1.0, 5.0, 30.0):
        for delta in (1e-3, 1e-6, 1e-12):
            assert bounds.gaussian_epsilon(mu, delta) == pytest.approx(get_epsilon_gaussian(1 / mu, delta), rel=1e-8)


@pytest.mark.parametrize("row", GOLDEN["once_per_pass"])
def test_without_amplification(row):
    value = accounting.epsilon_without_amplification(row["noise_multiplier"], row["passes"], row["delta"])
    assert_upper(value, row["epsilon"] - 1e-6, 1e-6)


@pytest.mark.parametrize("row", GOLDEN["laplace"])
def test_laplace(row):
    value = accounting.composed_epsilon([(Laplace(row["noise_multiplier"]), row["steps"])], row["delta"])
    assert row["pld"] * (1 - 1e-4) <= value <= row["pld"] * (1 + TIGHT)


def test_calibration_of_one_step():
    row = GOLDEN["calibration_one_step"]
    sigma = accounting.noise_multiplier(row["epsilon"], row["sampling_prob"], 1, row["delta"])
    assert row["noise_multiplier"] * (1 - 1e-7) <= sigma <= row["noise_multiplier"] * (1 + TIGHT)


def test_tradeoff():
    row = GOLDEN["tradeoff"]
    mu = accounting.gdp_mu(row["epsilon"], row["delta"])
    assert mu == pytest.approx(math.sqrt(row["passes"]) / row["noise_multiplier"], rel=1e-5)
    assert accounting.attack_tradeoff(mu, row["fpr"]) == pytest.approx(row["tpr"], abs=1e-5)
    assert accounting.attack_tradeoff(mu, 0) == 0
    assert accounting.attack_tradeoff(mu, 1) == 1
    assert accounting.attack_tradeoff(0, 0.3) == pytest.approx(0.3)


@few
@given(sigmas, probs, counts, deltas, relations)
def test_metamorphic(sigma, q, steps, delta, relation):
    base = accounting.epsilon(sigma, q, steps, delta, relation)
    up = base * (1 - TIGHT)
    assert accounting.epsilon(sigma, q, 2 * steps, delta, relation) >= up
    assert accounting.epsilon(sigma, min(1.0, 1.5 * q), steps, delta, relation) >= up
    assert accounting.epsilon(sigma, q, steps, delta / 10, relation) >= up
    assert accounting.epsilon(sigma * 0.8, q, steps, delta, relation) >= up
    assert accounting.epsilon(sigma, q, steps, delta, "replace_one") >= up
    assert accounting.epsilon(sigma, 1.0, steps, delta, relation) >= base
    if relation == "add_or_remove_one":
        assert accounting.epsilon(sigma, q, steps, delta, accountant="rdp") >= up


@few
@given(sigmas, probs, counts, counts, deltas)
def test_splitting_a_run_changes_nothing(sigma, q, first, second, delta):
    event = PoissonGaussian(sigma, q)
    whole = accounting.composed_epsilon([(event, first + second)], delta)
    assert accounting.composed_epsilon([(event, first), (event, 0), (event, second)], delta) == whole
    mixed = [(event, first), (PoissonGaussian(sigma * 1.01, q), second)]
    lower = accounting.composed_epsilon([(PoissonGaussian(sigma * 1.01, q), first + second)], delta)
    assert lower * (1 - TIGHT) <= accounting.composed_epsilon(mixed, delta) <= whole * (1 + TIGHT)
    assert accounting.composed_epsilon(mixed[::-1], delta) == accounting.composed_epsilon(mixed, delta)


@few
@given(st.floats(0.1, 12.0), probs, st.integers(1, 2000), deltas, relations)
def test_calibration_is_enough_and_tight(target, q, steps, delta, relation):
    sigma = accounting.noise_multiplier(target, q, steps, delta, relation)
    spent = accounting.epsilon(sigma, q, steps, delta, relation)
    assert spent <= target
    assert accounting.epsilon(sigma / (1 + TIGHT), q, steps, delta, relation) > target * (1 - 1e-12)
    coarse = accounting.noise_multiplier(target, q, steps, delta, relation, precision="coarse")
    assert sigma * (1 - TIGHT) <= coarse <= sigma * 1.02
    assert accounting.epsilon(coarse, q, steps, delta, relation, precision="coarse") <= target


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_max_steps(relation):
    sigma = accounting.noise_multiplier(3.0, 0.01, 1000, 1e-5, relation)
    steps = accounting.max_steps(3.0, sigma, 0.01, 1e-5, relation)
    assert 1000 <= steps <= 1003
    assert accounting.epsilon(sigma, 0.01, steps, 1e-5, relation) <= 3.0
    assert accounting.epsilon(sigma, 0.01, steps + 1, 1e-5, relation) > 3.0
    assert accounting.max_steps(0.0, sigma, 0.01, 1e-5, relation) == 0
    assert accounting.max_steps(3.0, 0.0, 0.01, 1e-5, relation) == 0


def test_ends_of_the_range():
    assert accounting.epsilon(1.0, 0.01, 0, 1e-5) == 0
    assert accounting.epsilon(0.0, 0.01, 1, 1e-5) == math.inf
    assert accounting.epsilon(0.0, 0.01, 1, 1e-5, accountant="rdp") == math.inf
    assert accounting.epsilon(1e6, 0.01, 1, 1e-5) == 0
    assert accounting.composed_epsilon([], 1e-5) == 0
    assert accounting.epsilon(0.05, 0.5, 10, 1e-5) > 500  # beyond the range of the loss distributions: still finite
    assert accounting.epsilon(1.0, 0.01, 1000, 1e-5) < accounting.epsilon(1.0, 0.01, 1000, 1e-30) < math.inf


@pytest.mark.parametrize("delta", [1e-10, 1e-11, 1e-12, 1e-15, 1e-40])
def test_tiny_delta_stays_between_its_neighbours(delta):
    value = accounting.epsilon(1.0, 0.01, 1000, delta)
    assert accounting.epsilon(1.0, 0.01, 1000, delta * 100) < value
    assert value <= accounting.epsilon(1.0, 0.01, 1000, delta, accountant="rdp") * (1 + 1e-12)
    replaced = accounting.epsilon(1.0, 0.01, 1000, delta, "replace_one")
    assert value * (1 - TIGHT) <= replaced <= accounting.epsilon(1.0, 1.0, 1000, delta, "replace_one")


def test_replace_one_without_sampling_doubles_the_distance():
    doubled = accounting.epsilon(1.0, 1.0, 3, 1e-5)
    assert accounting.epsilon(2.0, 1.0, 3, 1e-5, "replace_one") == pytest.approx(doubled, rel=1e-9)
    assert accounting.epsilon(2.0, 0.9999999, 3, 1e-5, "replace_one") == pytest.approx(doubled, rel=TIGHT)


def test_mixed_kinds_compose():
    both = [(PoissonGaussian(1.0, 0.01), 500), (Gaussian(5.0), 2), (Laplace(20.0), 3)]
    parts = [accounting.composed_epsilon([part], 1e-5) for part in both]
    assert max(parts) < accounting.composed_epsilon(both, 1e-5) < sum(parts)


def test_three_equal_runs_cost_less_than_three_epsilons():
    q, steps, delta = 1024 / 41203, 121, 1e-6
    event = PoissonGaussian(accounting.noise_multiplier(4.0, q, steps, delta), q)
    assert accounting.composed_epsilon([(event, steps)] * 3, delta) == pytest.approx(5.8, abs=0.1)


@pytest.mark.parametrize("event", [PoissonGaussian(1.1, 0.01), Gaussian(2.0), Laplace(0.5), PoissonLaplace(4.0, 0.1)])
def test_events_survive_json(event):
    assert accounting.event_from_dict(json.loads(json.dumps(event.to_dict()))) == event


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "discrete_gaussian", "noise_multiplier": 1.0},
        {"noise_multiplier": 1.0},
        {"kind": "gaussian"},
        {"kind": "gaussian", "noise_multiplier": 1.0, "sampling_prob": 0.5},
    ],
)
def test_unknown_events_are_refused(values):
    with pytest.raises(SottoError) as caught:
        accounting.event_from_dict(values)
    assert caught.value.code == "SOT402"


def test_an_event_of_another_class_is_refused():
    with pytest.raises(SottoError):
        accounting.composed_epsilon([("gaussian", 1)], 1e-5)  # type: ignore[list-item]


@pytest.mark.parametrize("event", [Laplace(1.0), PoissonLaplace(1.0, 0.1)])
def test_laplace_under_replacement_is_refused(event):
    with pytest.raises(SottoError) as caught:
        accounting.composed_epsilon([(event, 1)], 1e-5, "replace_one")
    assert caught.value.code == "SOT403"


# ---- Laplace noise on a Poisson batch


def outcomes(event: PoissonLaplace) -> tuple[np.ndarray, np.ndarray]:
    """Probability with the unit and without it of one step's outcomes: both tails whole, and 2,000 parts of [0, 1]."""
    b, q = event.noise_multiplier, event.sampling_prob

    def below(x: np.ndarray, centre: float) -> np.ndarray:
        return np.where(x < centre, 0.5 * np.exp((x - centre) / b), 1 - 0.5 * np.exp((centre - x) / b))

    edges = np.concatenate([[-np.inf], np.linspace(0, 1, 2001), [np.inf]])
    near, far = np.diff(below(edges, 0.0)), np.diff(below(edges, 1.0))
    return (1 - q) * near + q * far, near


def true_delta(event: PoissonLaplace, steps: int, epsilon: float) -> float:
    """The hockey-stick divergence of all steps, by summing over all their outcomes: the worse of the two directions."""
    with_unit, without = outcomes(event)
    p, q = with_unit, without
    for _ in range(steps - 1):
        p, q = np.outer(p, with_unit).ravel(), np.outer(q, without).ravel()
    return max(float(np.maximum(a - math.exp(epsilon) * b, 0).sum()) for a, b in ((p, q), (q, p)))


def assert_epsilon_is_right(event: PoissonLaplace, steps: int, delta: float, epsilon: float) -> None:
    assert true_delta(event, steps, epsilon) <= delta
    assert true_delta(event, steps, epsilon * (1 - 3e-3)) > delta


@pytest.mark.parametrize("delta", [1e-2, 1e-4])
@pytest.mark.parametrize(("scale", "q", "steps"), [(1.0, 0.1, 1), (0.4, 0.5, 1), (3.0, 0.9, 2), (0.7, 0.02, 2)])
def test_sampled_laplace_against_its_own_outcomes(scale, q, steps, delta):
    event = PoissonLaplace(scale, q)
    value = accounting.composed_epsilon([(event, steps)], delta)
    assert_epsilon_is_right(event, steps, delta, value)
    for mutant in (0.99 * value, 1.01 * value):
        with pytest.raises(AssertionError):
            assert_epsilon_is_right(event, steps, delta, mutant)


@pytest.mark.parametrize(("scale", "q"), [(1.0, 0.1), (0.4, 0.5), (3.0, 0.9), (5.0, 1.0), (0.2, 0.001)])
@pytest.mark.parametrize("steps", [1, 2])
def test_pure_epsilon_is_where_delta_becomes_zero(scale, q, steps):
    event = PoissonLaplace(scale, q)
    value = accounting.pure_epsilon([(event, steps)])
    assert true_delta(event, steps, value) <= 1e-15
    assert true_delta(event, steps, 0.999 * value) > 1e-12


def test_pure_epsilon_adds_up_and_gaussian_noise_has_none():
    parts = [(Laplace(4.0), 3), (PoissonLaplace(2.0, 0.25), 5)]
    expected = 3 / 4 + 5 * math.log(1 + 0.25 * (math.exp(0.5) - 1))
    assert accounting.pure_epsilon(parts) == pytest.approx(expected, rel=1e-9)
    assert accounting.pure_epsilon([*parts, (Gaussian(1e9), 1)]) == math.inf
    assert accounting.pure_epsilon([*parts, (Gaussian(1e9), 0)]) == accounting.pure_epsilon(parts)
    assert accounting.pure_epsilon([]) == 0
    assert accounting.pure_epsilon([(PoissonLaplace(0.0, 0.1), 1)]) == math.inf
    assert accounting.composed_epsilon(parts, 1e-12) <= accounting.pure_epsilon(parts) * (1 + 1e-9)
    assert accounting.composed_epsilon([(PoissonLaplace(0.0, 0.1), 1)], 1e-5) == math.inf


def test_many_sampled_laplace_steps_cost_far_less_at_a_positive_delta():
    event = PoissonLaplace(accounting.laplace_noise_multiplier(4.0, 0.016, 1000), 0.016)
    assert event.noise_multiplier == pytest.approx(4.47, abs=0.01)
    assert accounting.composed_epsilon([(event, 1000)], 1e-5) < 1.0


@few
@given(st.floats(0.05, 2000.0), st.floats(1e-4, 1.0), st.integers(1, 5000))
def test_laplace_calibration_is_enough_and_tight(target, q, steps):
    scale = accounting.laplace_noise_multiplier(target, q, steps)
    assert accounting.pure_epsilon([(PoissonLaplace(scale, q), steps)]) <= target
    if target / steps < 700:
        assert accounting.pure_epsilon([(PoissonLaplace(scale * (1 - 1e-9), q), steps)]) > target


def test_without_sampling_it_is_plain_laplace():
    counted = [(PoissonLaplace(5.0, 1.0), 4)]
    assert accounting.composed_epsilon(counted, 1e-5) == accounting.composed_epsilon([(Laplace(5.0), 4)], 1e-5)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("call", "name"),
    [
        *(
            (lambda v=v: accounting.epsilon(v, 0.1, 1, 1e-5), "noise_multiplier")
            for v in (NAN, INF, -1.0, "1", None, True)
        ),
        *((lambda v=v: accounting.epsilon(1.0, v, 1, 1e-5), "sampling_prob") for v in (NAN, INF, 0.0, -0.1, 1.0001)),
        *((lambda v=v: accounting.epsilon(1.0, 0.1, v, 1e-5), "steps") for v in (-1, 1.5, NAN, True)),
        *((lambda v=v: accounting.epsilon(1.0, 0.1, 1, v), "delta") for v in (NAN, 0.0, 1.0, -1e-5, INF)),
        (lambda: accounting.epsilon(1.0, 0.1, 1, 1e-5, "replace_two"), "neighboring_relation"),
        *((lambda v=v: accounting.noise_multiplier(v, 0.1, 1, 1e-5), "epsilon") for v in (0.0, -1.0, NAN, INF)),
        (lambda: accounting.noise_multiplier(1.0, 0.1, 0, 1e-5), "steps"),
        (lambda: accounting.noise_multiplier(1.0, 0.1, 1, 1e-5, precision="rough"), "precision"),
        (lambda: PoissonLaplace(-1.0, 0.1), "noise_multiplier"),
        (lambda: PoissonLaplace(1.0, 0.0), "sampling_prob"),
        (lambda: accounting.pure_epsilon([(Laplace(1.0), -1)]), "steps"),
        (lambda: accounting.laplace_noise_multiplier(0.0, 0.1, 1), "epsilon"),
        (lambda: accounting.laplace_noise_multiplier(1.0, 0.1, 0), "steps"),
        (lambda: accounting.epsilon_without_amplification(1.0, -1, 1e-5), "steps"),
        (lambda: accounting.gdp_mu(NAN, 1e-5), "epsilon"),
        (lambda: accounting.attack_tradeoff(1.0, 1.5), "fpr"),
        (lambda: accounting.suggest_delta(0), "num_units"),
    ],
)
def test_bad_arguments(call, name):
    with pytest.raises(SottoError) as caught:
        call()
    assert caught.value.code == "SOT401"
    assert name in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("accountant", ["gdp", "RDP", ""])
def test_unknown_accountants_are_refused(accountant):
    with pytest.raises(SottoError):
        accounting.epsilon(1.0, 0.1, 1, 1e-5, accountant=accountant)
    with pytest.raises(SottoError):
        accounting.epsilon(1.0, 0.1, 1, 1e-5, "replace_one", accountant="rdp")


def test_suggest_delta():
    assert [accounting.suggest_delta(n) for n in (1, 10, 11, 41203, 100_000, 100_001)] == [
        1e-1, 1e-2, 1e-3, 1e-6, 1e-6, 1e-7
    ]  # fmt: skip
    assert all(accounting.suggest_delta(n) <= 1 / (10 * n) for n in range(1, 3000))


def test_import_is_light():
    code = "import sys, sotto.privacy.accounting; print({'torch', 'dp_accounting', 'scipy'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )

"""Every known way to get differential privacy wrong is planted, and an ordinary test has to notice."""

from __future__ import annotations

import faults_between_units
import faults_in_accounting
import faults_in_distributed
import faults_in_exact_noise
import faults_in_federated
import faults_in_gradients
import faults_in_masks
import faults_in_noise
import faults_in_releases
import faults_in_sampling
import faults_in_split
import faults_in_tuning
import faults_in_wiring
import faults_in_zeroth_order
import mutant
import pytest
from mutant import CATALOGUE, CLASSES, Mutant

FILES = (
    faults_between_units,
    faults_in_accounting,
    faults_in_distributed,
    faults_in_exact_noise,
    faults_in_federated,
    faults_in_gradients,
    faults_in_masks,
    faults_in_noise,
    faults_in_releases,
    faults_in_sampling,
    faults_in_split,
    faults_in_tuning,
    faults_in_wiring,
    faults_in_zeroth_order,
)


@pytest.mark.parametrize("test", sorted({m.test for m in CATALOGUE}))
def test_green_without_a_fault(test: str, request: pytest.FixtureRequest) -> None:
    """In a run of the whole suite the ordinary test tells for itself; where only mutants run, it is run here."""
    if any(f"{item.path.name}::{item.name}".startswith(test) for item in request.session.items):
        return
    outcome = mutant.run(test)
    assert not outcome.trouble
    assert not outcome.errors, f"{test} fails on the code as it is: {outcome.errors}"


@pytest.mark.parametrize("planted", CATALOGUE, ids=lambda m: f"{m.bug_class}-{m.name}")
def test_red_with_the_fault(planted: Mutant) -> None:
    outcome = mutant.run(planted.test, planted.plant)
    assert not outcome.trouble
    assert outcome.errors, f"SURVIVED: {planted.name}: {planted.plant.__doc__}; {planted.test} did not notice"
    assert mutant.noticed(outcome.errors[0]), repr(outcome.errors[0])


def test_every_class_has_mutants() -> None:
    assert {m.bug_class for m in CATALOGUE} == CLASSES.keys() == set(range(1, 29))


def test_names_are_told_apart_and_faults_are_described() -> None:
    assert len({m.name for m in CATALOGUE}) == len(CATALOGUE)
    assert all(m.plant.__doc__ for m in CATALOGUE)
    assert all(any(m.plant.__module__ == file.__name__ for file in FILES) for m in CATALOGUE)


# ---- the runner itself


def harmless(patch: pytest.MonkeyPatch) -> None:
    """Changes nothing."""


def nonsense(patch: pytest.MonkeyPatch) -> None:
    """Breaks the code in a way that no test could fail to notice, but that says nothing."""
    patch.setattr("sotto.privacy.accounting.round_up", lambda value: 1 / 0)


def misfit(patch: pytest.MonkeyPatch) -> None:
    """Names something that does not exist."""
    patch.setattr("sotto.privacy.accounting.no_such_function", None)


ROUNDING = "test_privacy_statement.py::test_numbers_are_rounded_up[3.0-"


def test_the_runner_tells_a_mutant_that_survives() -> None:
    with pytest.raises(AssertionError, match="SURVIVED"):
        test_red_with_the_fault(Mutant(24, harmless, ROUNDING))


def test_the_runner_takes_no_crash_for_a_failure() -> None:
    with pytest.raises(AssertionError):
        test_red_with_the_fault(Mutant(24, nonsense, ROUNDING))
    assert mutant.run(ROUNDING, nonsense).errors


@pytest.mark.parametrize(
    "test", ["test_privacy_statement.py::test_no_such", "test_no_such_file.py::test_x", f"{ROUNDING}9"]
)
def test_the_runner_takes_no_missing_test_for_a_failure(test: str) -> None:
    for plant in (None, harmless):
        assert "no such test" in mutant.run(test, plant).trouble[0]


def test_the_runner_takes_no_misfit_for_a_failure() -> None:
    assert "does not fit" in mutant.run(ROUNDING, misfit).trouble[0]


def test_a_fault_is_gone_afterwards() -> None:
    from sotto.privacy import accounting

    before = accounting.round_up
    mutant.run(ROUNDING, nonsense)
    assert accounting.round_up is before
    assert not mutant.run(ROUNDING).errors

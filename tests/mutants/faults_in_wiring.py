"""Faults in how right parts are put together, for one kind of run alone; and in what a run leaves beside its folder."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutant import caught_by, wrapped

from sotto import session as sessions
from sotto import training
from sotto.config import Config
from sotto.data.sampling import PoissonSampler
from sotto.gradients.clipping import Flat

WIRING = "test_wiring.py::test_a_run_does_what_its_plan_says["
LEFT = "test_left_behind.py::test_a_training_prints_logs_and_leaves_nothing_elsewhere[classification-gradients"


def less_noise(m: pytest.MonkeyPatch, where: Callable[[Config], bool]) -> None:
    """Seven tenths of the plan's noise, where the configuration is so."""

    def make_mechanism(right: Any, config: Config, *rest: Any) -> Any:
        made = right(config, *rest)
        if where(config):
            made.noise_multiplier *= 0.7
        return made

    wrapped(m, sessions, "make_mechanism", make_mechanism)


@caught_by(WIRING + "classification-forward]", 9)
def exact_derivatives_have_less_noise(m: pytest.MonkeyPatch) -> None:
    """Forward gradients are noised for differences of another scale."""
    less_noise(m, lambda config: config.method.zeroth_smoothing == 0)


@caught_by(WIRING + "completion-laplace-forward]", 9)
def laplace_noise_is_scaled_like_gaussian_noise(m: pytest.MonkeyPatch) -> None:
    """A deviation is taken for a scale: sqrt(1/2) of the noise."""
    less_noise(m, lambda config: config.method.laplace)


@caught_by(WIRING + "classification-side]", 9)
def side_networks_have_less_noise(m: pytest.MonkeyPatch) -> None:
    """They are smaller, so somebody thought that less would do."""
    less_noise(m, lambda config: config.method.train == "side")


@caught_by(WIRING + "completion-int4]", 9)
def rounded_weights_count_as_noise(m: pytest.MonkeyPatch) -> None:
    """What is lost in rounding frozen weights is public, and hides nobody."""
    less_noise(m, lambda config: config.method.frozen_weights != "float32")


@caught_by(WIRING + "classification-users-exact]", 9)
def a_federated_run_has_less_noise(m: pytest.MonkeyPatch) -> None:
    """The server's mechanism is not that of the plan."""
    less_noise(m, lambda config: config.setting.kind == "federated")


@caught_by(WIRING + "classification-full]", 9)
def a_resumed_run_has_less_noise(m: pytest.MonkeyPatch) -> None:
    """What was built the first time is right; a crash makes it wrong."""

    def resume(right: Any, *args: Any, **kwargs: Any) -> Any:
        session = right(*args, **kwargs)
        session.mechanism.noise_multiplier *= 0.7
        return session

    wrapped(m, sessions, "resume", resume)


@caught_by(WIRING + "classification-sgd]", 1)
def a_resumed_run_draws_more(m: pytest.MonkeyPatch) -> None:
    """Twice the sampling probability, from the second start on."""

    def resume(right: Any, *args: Any, **kwargs: Any) -> Any:
        session = right(*args, **kwargs)
        given: PoissonSampler = session.sampler
        session.sampler = PoissonSampler(given.num_units, 2 * given.sampling_prob, given._key, given.debug)
        return session

    wrapped(m, sessions, "resume", resume)


@caught_by(WIRING + "completion-reversible]", 3)
def reversible_networks_are_clipped_to_another_norm(m: pytest.MonkeyPatch) -> None:
    """A constant where the configuration's bound belongs, for one method."""
    right = sessions.make_clipping
    m.setattr(
        sessions, "make_clipping", lambda config: Flat(1.0) if config.method.train == "reversible" else right(config)
    )


# ---- 21: beside the run folder


def told(m: pytest.MonkeyPatch, tell: Callable[[str], object]) -> None:
    """Tells the losses of single examples."""

    def losses_of(right: Any, session: Any, examples: Any) -> torch.Tensor:
        losses = right(session, examples)
        tell(f"losses {losses.detach().tolist()}")
        return losses

    wrapped(m, training, "losses_of", losses_of)


@caught_by(LEFT, 21)
def losses_are_printed(m: pytest.MonkeyPatch) -> None:
    """A line that was left in from a search for a fault."""
    told(m, print)


@caught_by(LEFT, 21)
def losses_are_logged(m: pytest.MonkeyPatch) -> None:
    """At a level that nobody sees, until somebody collects all logs."""
    told(m, logging.getLogger("sotto.training").debug)


@caught_by(LEFT, 21)
def losses_stay_in_the_temporary_folder(m: pytest.MonkeyPatch) -> None:
    """Which others may read, and nobody empties."""
    told(m, lambda words: (Path(tempfile.gettempdir()) / "losses.txt").write_text(words))


@caught_by(LEFT, 21)
def losses_stay_where_the_program_was_started(m: pytest.MonkeyPatch) -> None:
    """A file in the current folder, which may be a repository."""
    told(m, lambda words: Path("losses.txt").write_text(words))

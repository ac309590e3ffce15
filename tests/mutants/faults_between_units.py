"""Faults by which one unit's text reaches what is computed or stored for others: not through a layer, but the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mutant import caught_by, wrapped

from sotto import checkpoint, dropout, training
from sotto.models import activation_cache
from sotto.models import load as models_load


@caught_by("test_dropout.py::test_masks_follow_from_nothing_that_is_stored", 6)
def dropout_masks_follow_from_the_seed_of_the_configuration(m: pytest.MonkeyPatch) -> None:
    """A mask is then known for each place of a batch, and who stands there depends on who else was drawn."""
    m.setattr(dropout.secrets, "token_bytes", lambda size: bytes(size))


@caught_by("test_dropout.py::test_every_step_and_every_attempt_has_masks_of_its_own", 6)
def every_step_has_the_same_dropout_masks(m: pytest.MonkeyPatch) -> None:
    """One seed, drawn when the program starts."""
    seed = dropout.secrets.token_bytes(8)
    m.setattr(dropout.secrets, "token_bytes", lambda size: seed[:size] * (1 if size <= 8 else 2))


@caught_by("test_dropout.py::test_layers_are_not_dropped_for_a_whole_batch", 6)
def layers_are_dropped_for_a_whole_microbatch(m: pytest.MonkeyPatch) -> None:
    """LayerDrop stays on: who shares a draw depends on who was drawn."""
    right = models_load.remove_dropout
    m.setattr(models_load, "remove_dropout", lambda config, words: [] if "layerdrop" in words else right(config, words))


@caught_by("test_train_side.py::test_a_unit_whose_stored_outputs_are_strange_moves_the_sum_by_its_bound_alone", 6)
def one_value_that_is_too_large_rounds_everybody(m: pytest.MonkeyPatch) -> None:
    """All stored outputs lose digits as soon as one of them is beyond float16."""
    beyond: list[bool] = []
    original = activation_cache.ActivationCache._stored

    def write(right: Any, self: Any, rows: Any, outputs: Any) -> None:
        beyond.append(
            any(bool((x.abs() > 65_504).any()) or not bool(torch.isfinite(x).all()) for x in outputs.values())
        )
        right(self, rows, outputs)

    wrapped(m, activation_cache.ActivationCache, "write", write)
    m.setattr(
        activation_cache.ActivationCache,
        "_stored",
        lambda self, row: original(self, row).bfloat16() if any(beyond) else original(self, row),
    )


@caught_by("test_replay.py::test_a_unit_that_does_not_fit_in_memory_shows_nowhere", 21)
def a_checkpoint_tells_what_did_not_fit(m: pytest.MonkeyPatch) -> None:
    """The size that microbatches were halved to, which is that of the longest text of a batch."""
    sizes = [0]

    def clipped_sum(right: Any, session: Any, *rest: Any) -> Any:
        total = right(session, *rest)
        sizes.append(session.microbatch_size)
        return total

    def save(right: Any, folder: Any, state: Any) -> Any:
        return right(folder, replace(state, extra={**state.extra, "microbatch_size": sizes[-1]}))

    wrapped(m, training, "clipped_sum", clipped_sum)
    wrapped(m, checkpoint, "save", save)

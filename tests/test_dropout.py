"""Dropout masks: nobody knows them, and whoever else was drawn has no part in the law of an example's mask."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replay
import tiny_models
import tiny_runs
import torch
from transformers import OPTConfig, OPTForCausalLM

from sotto import dropout, training
from sotto import session as sessions
from sotto.models import load as models_load
from sotto.models import source

CPU = torch.device("cpu")
DROPPED: dict[str, Any] = {"method": {"train": "full", "dropout": True}}


def drawn(config: Any, *where: object) -> torch.Tensor:
    with dropout.masks(config, CPU, *where):
        return torch.rand(8)


def test_masks_follow_from_nothing_that_is_stored(tmp_path: Path) -> None:
    config = tiny_runs.config(tmp_path, **DROPPED)
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        found.append(drawn(config, 5))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_masks_of_a_run_that_is_compared_follow_its_debug_seed(tmp_path: Path) -> None:
    config = tiny_runs.config(tmp_path, **DROPPED, run={"debug_noise_seed": 3})
    assert torch.equal(drawn(config, 5), drawn(config, 5))
    others = [drawn(config, 6), drawn(config, 5, 1), drawn(config.with_overrides(["run.debug_noise_seed=4"]), 5)]
    assert not any(torch.equal(drawn(config, 5), other) for other in others)


@pytest.mark.parametrize("dropping", [True, False])
def test_the_global_stream_is_left_alone(tmp_path: Path, dropping: bool) -> None:
    config = tiny_runs.config(tmp_path, method={"dropout": dropping})
    torch.manual_seed(1)
    expected = torch.rand(8)
    torch.manual_seed(1)
    with dropout.masks(config, CPU, 0):
        pass
    assert torch.equal(torch.rand(8), expected)


def test_every_step_and_every_attempt_has_masks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    original = training.clipped_sum

    def clipped_sum(*args: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            seen.append(torch.rand(8))
        return original(*args)

    monkeypatch.setattr(training, "clipped_sum", clipped_sum)
    for _ in range(2):  # with the same units in each step of both
        session = sessions.start(tiny_runs.config(tmp_path, **DROPPED), "x")
        for step in (0, 1):
            training._sum_of_all(session, np.arange(3), step)
    assert len({tuple(draw.tolist()) for draw in seen}) == 4


def moved(folder: Path, patch: pytest.MonkeyPatch, same_masks: bool) -> list[float]:
    """How far sums of neighbours move, each unit in a microbatch of its own, if need be with masks that are its own."""
    original = training.losses_of

    def losses_of(session: Any, examples: np.ndarray) -> torch.Tensor:
        first = session.data.examples.offsets[examples[0]]
        if same_masks:  # the unit is known by its text: later ones have other numbers in the neighbouring data
            torch.manual_seed(int(session.data.examples.input_ids[first : first + 4] @ [1, 100, 10_000, 1_000_000]))
        return original(session, examples)

    patch.setattr(training, "losses_of", losses_of)
    changes = tiny_runs.merge(DROPPED, {"run": {"microbatch_size": 1}, "privacy": {"max_examples_per_unit": 1}})
    one, two = replay.pair(folder, "classification", changes)
    return replay.check_sensitivity(one, two, replaced=False)


def test_with_the_same_masks_for_every_unit_a_sum_moves_by_no_more_than_its_sensitivity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the guarantee rests on: independent masks can be given to the units that two neighbours share."""
    assert max(moved(tmp_path, monkeypatch, same_masks=True)) > 0.5


def test_masks_by_place_would_move_it_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: masks from a public seed, one after the other, are others for everybody behind the unit."""
    monkeypatch.setattr(dropout.secrets, "token_bytes", lambda size: bytes(size))
    with pytest.raises(AssertionError, match="the sum moved"):
        moved(tmp_path, monkeypatch, same_masks=False)


def test_the_processes_of_a_run_have_masks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_distributed import in_threads

    asked: list[tuple[object, ...]] = []

    @contextlib.contextmanager
    def masks(config: Any, device: Any, *where: object) -> Any:
        asked.append(where)
        yield

    monkeypatch.setattr(dropout, "masks", masks)
    in_threads(2, tiny_runs.config(tmp_path, **DROPPED, run={"steps": 2}))
    assert sorted(asked) == [(0,), (0, 1), (1,), (1, 1)]


def test_layers_are_not_dropped_for_a_whole_batch(tmp_path: Path) -> None:
    given = OPTConfig(**tiny_models.ENCODER, word_embed_proj_dim=32, ffn_dim=64, layerdrop=0.5, dropout=0.25)
    OPTForCausalLM(given).save_pretrained(tmp_path)
    facts = source.inspect(tmp_path)
    kept = models_load.build_config(facts, keep_dropout=True)
    assert (kept.layerdrop, kept.dropout) == (0, 0.25)
    assert models_load.build_config(facts, keep_dropout=False).dropout == 0

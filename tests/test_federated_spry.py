"""Users who look along directions of one part of the weights (Spry): whose numbers move what, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch

from sotto import session as sessions
from sotto.config import Config
from sotto.federated.client import bounded
from sotto.federated.simulate import simulate
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.release import NAME

PARTS, PROBES, CLIP = 4, 3, 0.05
METHOD = {"train": "lora", "gradient": "zeroth_order", "zeroth_probes": PROBES, "zeroth_smoothing": 0,
          "clip_norm": CLIP}  # fmt: skip
SETTING = {"kind": "federated", "parts": PARTS}


def config(folder: Path, **changes: Any) -> Config:
    method = {**METHOD, **changes.pop("method", {})}
    return tiny_runs.config(folder, setting={**SETTING, **changes.pop("setting", {})}, method=method, **changes)


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    return loaded(tmp_path).engine


def loaded(folder: Path) -> Any:
    """A model that has been trained a little: where adapters and head begin at zero, most derivatives are zero."""
    parts = sessions.load_parts(config(folder), "key")
    tiny_models.perturb(parts.model, 0.3)
    return parts


def moved_by_one(engine: Any, others: list[int], user: int) -> torch.Tensor:
    with_user = engine.collect(np.array(sorted([*others, user])), 2).gradients[NAME]
    return with_user - engine.collect(np.array(others), 2).gradients[NAME]


def test_a_user_moves_the_sum_in_its_own_part_and_by_no_more_than_the_bound(engine: Any):
    others = [3, 8, 20, 21, 40]
    for user in (0, 10, 59):
        difference = moved_by_one(engine, others, user).view(PARTS, PROBES)
        part = engine.directions.part_for(2, user)
        elsewhere = torch.cat([difference[:part], difference[part + 1 :]])
        assert float(elsewhere.abs().max()) < 1e-9
        assert 0 < float(difference.norm()) <= CLIP * (1 + 1e-6)
    assert len({engine.directions.part_for(2, user) for user in (0, 10, 59)}) > 1


def test_negative_twin_parts_dealt_out_among_those_drawn(engine: Any, monkeypatch: pytest.MonkeyPatch):
    """As Spry's own code deals them out: one user more moves all who come after, and the bound does not hold."""
    ranks = {"drawn": np.zeros(0, dtype=int)}
    monkeypatch.setattr(Directions, "part_for", lambda self, step, unit: int(sum(ranks["drawn"] < unit)) % self.parts)
    collect = engine.collect

    def watched(users: np.ndarray, step: int) -> Any:
        ranks["drawn"] = users
        return collect(users, step)

    monkeypatch.setattr(engine, "collect", watched)
    assert float(moved_by_one(engine, [3, 8, 20, 21, 40], 0).norm()) > 2 * CLIP


def test_numbers_for_other_parts_move_the_sum_by_no_more_either(engine: Any):
    answer = np.full(PARTS * PROBES, 1e30, dtype=np.float32)
    total = engine.add_up(np.arange(2), [(0, answer), (1, answer[:PROBES])]).gradients[NAME]
    assert float(total.norm()) <= CLIP * (1 + 1e-6)
    assert engine.heard.refused == {"another shape": 1}


def test_one_round_is_the_noiseless_sum_of_clipped_gradients_times_directions(tmp_path: Path):
    """Against autograd on a model of its own: every user's gradient along its directions, scaled, cut and added up."""
    from sotto.losses import forward_losses

    parts = loaded(tmp_path)
    engine: Any = parts.engine
    users, expected = np.array([1, 4, 33]), torch.zeros(PARTS, PROBES, dtype=torch.float64)
    for user in users.tolist():
        rows = parts.data.units.members_of(np.array([user]))[0]
        batch = parts.data.examples.collate(rows, parts.tokenizer.pad_token_id)
        named = {n: p for n, p in parts.model.named_parameters() if p.requires_grad}
        loss = forward_losses(parts.model.eval(), batch, "classification").sum()
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
        part, d = engine.directions.part_for(0, user), engine.directions
        numbers_K = torch.zeros(PROBES)
        for k in range(PROBES):
            for name, gradient in gradients.items():
                if d.part[name] == part and gradient is not None:
                    numbers_K[k] += (gradient * d.tensor(name, 0, k)).sum() * (PARTS / PROBES) ** 0.5
        expected[part] += bounded(numbers_K, CLIP).double()
    found = engine.collect(users, 0).gradients[NAME].view(PARTS, PROBES)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_run_says_what_a_step_releases(tmp_path: Path):
    run = simulate(config(tmp_path))
    facts = json.loads((run.path / "privacy.json").read_text())
    assert facts["numbers_released_per_step"] == PARTS * PROBES
    assert f"within one of {PARTS} parts of the weights, by a public draw" in " ".join(run.statement.split())
    assert run.steps == 4


@pytest.mark.parametrize(
    ("setting", "method", "word"),
    [
        ({}, {"gradient": "auto"}, "setting.parts is for"),
        ({"sites": 2}, {}, "parts are dealt out"),
        ({}, {"zeroth_sides": 2}, "zeroth_sides: 1"),
        ({"parts": 0}, {}, "parts"),
    ],
)
def test_what_has_no_meaning_is_refused(setting: Any, method: Any, word: str, tmp_path: Path):
    with pytest.raises(Exception, match=word):
        config(tmp_path, setting=setting, method=method)


def test_more_parts_than_tensors_are_refused(tmp_path: Path):
    with pytest.raises(Exception, match="SOT650"):
        sessions.load_parts(config(tmp_path, method={"train": "head"}, setting={"parts": 50}), "key")

"""Whole runs with side and reversible networks: trained, resumed, used and exported; and the activation cache."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch

import sotto
from sotto import activations, checkpoint, memory_estimate, training
from sotto import session as sessions
from sotto.config import Config
from sotto.errors import SottoError
from sotto.gradients.base import ClippedSum
from sotto.models.activation_cache import ActivationCache
from sotto.models.load import load_model
from sotto.models.source import inspect
from sotto.models.trainable import describe, prepare

SIDE = {"train": "side", "side_reduction": 2}
METHODS: dict[str, dict[str, Any]] = {
    "side": SIDE,
    "side-light": {**SIDE, "side_block": "light", "side_every": 2},
    "side-pruned": {**SIDE, "side_init": "prune"},
    "side-cached": {**SIDE, "side_cache": True},
    "reversible-lora": {"train": "reversible"},
    "reversible-full": {"train": "reversible", "reversible_train": "full"},
    "reversible-stored": {"train": "reversible", "reversible_streams": "stored"},
}
BOTH = ("classification", "completion")
DEBUG = {"debug_noise_seed": 5}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", BOTH)
def test_a_run_is_private_and_its_export_is_the_trained_model(tmp_path: Path, kind: str, method: str):
    done = sotto.train(tiny_runs.config(tmp_path, kind, method=METHODS[method]))
    assert done.finished
    assert 0 < done.epsilon <= 8.0
    train = METHODS[method]["train"]
    stored = sotto.load(done.path / "model")
    assert type(stored).__name__.lower().startswith(train)
    facts = json.loads((done.path / "model" / "config.json").read_text())
    assert str(tmp_path) not in json.dumps(facts)
    card = (done.path / "model" / "README.md").read_text()
    assert ("cannot be merged" if train == "side" else "coupled") in card
    ids = torch.randint(5, 40, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(stored(ids).logits, done.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    again = sotto.export(done.path, tmp_path / "elsewhere")
    tiny_runs.assert_same(stored.state_dict(), sotto.load(again).state_dict())


@pytest.mark.parametrize("method", ["side", "reversible-lora"])
def test_a_trained_model_is_used(tmp_path: Path, method: str):
    held_out = tiny_runs.write_csv(tmp_path / "held_out.csv", tiny_runs.rows(20, seed=8))
    done = sotto.train(tiny_runs.config(tmp_path, method=METHODS[method]))
    scores = sotto.evaluate(done.path, str(held_out))
    assert 0 <= scores["accuracy"] <= 1
    writer = sotto.train(tiny_runs.config(tmp_path, "completion", method=METHODS[method]))
    text = sotto.generate(writer.path, "w1 w2", max_new_tokens=4)
    assert isinstance(text, str)
    assert text == sotto.generate(writer.path / "model", "w1 w2", max_new_tokens=4)


class Stopped(Exception):
    pass


def stop_after(m: pytest.MonkeyPatch, steps: int) -> None:
    right = training.save_checkpoint

    def save(session: Any) -> None:
        right(session)
        if session.step == steps:
            raise Stopped

    m.setattr(training, "save_checkpoint", save)


@pytest.mark.parametrize("method", ["side", "side-cached", "reversible-lora"])
@pytest.mark.parametrize("kind", BOTH)
def test_a_run_that_is_resumed_ends_with_the_same_bits(
    tmp_path: Path, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_runs.config(tmp_path, kind, method=METHODS[method], run=DEBUG)
    whole = sotto.train(config)
    with monkeypatch.context() as m:
        stop_after(m, 2)
        with pytest.raises(Stopped):
            sotto.train(config)
    (half,) = [path for path in (tmp_path / "runs").iterdir() if path != whole.path]
    assert activations.folder(sessions.RunDir.open(half)).is_dir() == (method == "side-cached")
    done = sotto.resume(half)
    tiny_runs.assert_same(tiny_runs.final_weights(whole.path), tiny_runs.final_weights(done.path))


@pytest.mark.parametrize("method", ["side", "reversible-lora"])
def test_checkpoints_hold_what_is_trained_and_nothing_else(tmp_path: Path, method: str):
    config = tiny_runs.config(tmp_path, method=METHODS[method])
    done = sotto.train(config)
    trained = describe(prepare(load_model(config.model, config.data, config.method, 0).model, config.method))
    assert trained["trainable"] < trained["total"]
    latest, _ = checkpoint.load_latest(done.path / "checkpoints")
    assert latest is not None
    assert set(latest.weights) == set(trained["names"])


@pytest.mark.parametrize("block", ["layer", "light"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", BOTH)
def test_a_plan_counts_what_is_trained(tmp_path: Path, kind: str, every: int, block: str):
    """From shapes alone: exactly for light blocks, and but for a few biases and norms for layers of the model's own."""
    method = {**SIDE, "side_block": block, "side_every": every}
    config = tiny_runs.config(tmp_path, kind, method=method)
    model = prepare(load_model(config.model, config.data, config.method, 0).model, config.method)
    facts = inspect(Path(config.model.name))
    counted = memory_estimate.trainable_parameters(facts, config)
    assert counted == pytest.approx(describe(model)["trainable"], rel=1e-12 if block == "light" else 0.05)


def test_nothing_private_is_in_the_start(tmp_path: Path):
    """Two datasets that share no text give the same bits before the first step."""
    starts = []
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        tiny_runs.write_csv(folder / "notes.csv", tiny_runs.rows(seed=seed))
        for name in ("side", "side-pruned", "reversible-lora"):
            session = sessions.start(tiny_runs.config(folder, method=METHODS[name]), name)
            session.held.close()
            session.engine.detach()
            starts.append((name, session.model.state_dict()))
    for (name, first), (_, second) in zip(starts[:3], starts[3:], strict=True):
        tiny_runs.assert_same(first, second)
        assert first, name


# ---- the activation cache


def cached(folder: Path, kind: str, **changes: Any) -> Any:
    """A session with a filled cache."""
    config = tiny_runs.config(folder, kind, method=METHODS["side-cached"], **changes)
    session = sessions.start(config, "run")
    session.activations = activations.fill(session, training.autocast(config, session.device))
    return session


@pytest.mark.parametrize("kind", [*BOTH, "plain_text"])
def test_stored_outputs_give_the_same_sums_without_the_layers(tmp_path: Path, kind: str):
    session = cached(tmp_path, kind)
    torch.nn.init.normal_(session.model.side.up.weight, std=0.1)  # at the start the side network has no effect
    calls: list[int] = []
    for layer in session.model.stack.layers:
        for part in layer.children():
            part.register_forward_hook(lambda module, given, out: calls.append(1))
    units = session.sampler.draw(0, 0)
    stored, session.activations = session.activations, None
    plain = training.clipped_sum(session, units, 0)
    assert calls
    calls.clear()
    session.activations = stored
    fast = training.clipped_sum(session, units, 0)
    assert not calls, "the layers of the frozen model were run"
    torch.testing.assert_close(fast.norms, plain.norms, rtol=5e-3, atol=1e-6)
    # Half precision is off by a share of what is added up; in a tensor of one number (a gate) much of that cancels.
    size = float(torch.cat([value.flatten() for value in plain.gradients.values()]).norm())
    for name, value in plain.gradients.items():
        torch.testing.assert_close(fast.gradients[name], value, rtol=2e-2, atol=1e-3 * size + 1e-7)


def test_the_cache_is_private_and_gone_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_runs.config(tmp_path, method=METHODS["side-cached"])
    with monkeypatch.context() as m:
        stop_after(m, 2)
        with pytest.raises(Stopped):
            sotto.train(config)
    run = tiny_runs.only_run(tmp_path)
    folder = activations.folder(sessions.RunDir.open(run))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    sotto.resume(run)
    assert not folder.exists()


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_a_unit_whose_stored_outputs_are_strange_moves_the_sum_by_its_bound_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
):
    """The others' gradients are computed from the same bits, whatever one unit's text makes of the frozen model."""
    config = tiny_runs.config(tmp_path, "completion", method={**METHODS["side-cached"], "clip_norm": 1e-3})
    units, strange = np.arange(12), 5

    def summed(spoil: bool) -> ClippedSum:
        session = sessions.start(config, "run")
        rows, _ = session.data.units.members_of(np.array([strange]))
        original = ActivationCache.write

        def write(cache: ActivationCache, written: list[int], outputs: dict[int, torch.Tensor]) -> None:
            for at, row in enumerate(written):
                if spoil and row in rows:
                    next(iter(outputs.values()))[at, 0, 0] = value
            original(cache, written, outputs)

        monkeypatch.setattr(ActivationCache, "write", write)
        session.activations = activations.fill(session, training.autocast(config, session.device))
        monkeypatch.setattr(ActivationCache, "write", original)
        return training.clipped_sum(session, units, 0)

    plain, spoilt = summed(False), summed(True)
    assert int((plain.norms != spoilt.norms).sum()) == 1
    moved = sum(float((a - spoilt.gradients[n]).double().square().sum()) for n, a in plain.gradients.items()) ** 0.5
    assert 0 < moved < 2.01 * plain.sensitivity


# ---- what is refused


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"train": "lora", "side_cache": True}, "method.side_cache"),
        ({"train": "side", "side_reduction": 0}, "side_reduction"),
        ({"train": "side", "side_blocks": "light"}, "Did you mean 'side_block'"),
        ({"train": "reversible", "reversible_train": "head"}, "reversible_train"),
        ({"train": "sides"}, "side"),
    ],
)
def test_a_configuration_that_means_nothing(tmp_path: Path, method: dict[str, Any], says: str):
    with pytest.raises(SottoError) as caught:
        Config.from_dict(tiny_runs.classification(tmp_path, method=method))
    assert says in str(caught.value)

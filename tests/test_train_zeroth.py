"""Whole runs with zeroth-order gradients: private, resumed to the same bits, exported, audited, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

import sotto
from sotto import session as sessions
from sotto import training
from sotto.auditing.mechanism import audit_mechanism
from sotto.errors import SottoError
from sotto.privacy import accounting
from sotto.privacy.events import PoissonLaplace
from sotto.privacy.mechanism import LaplaceMechanism
from sotto.privacy.plan import make_plan
from sotto.reporting import plan_text
from sotto.rundir import RunDir
from sotto.zeroth_order.engine import ZerothOrder
from sotto.zeroth_order.pruning import masks
from sotto.zeroth_order.release import NAME

METHODS: dict[str, dict[str, Any]] = {
    "aggzo": {},
    "sides": {"zeroth_sides": 4},
    "dpzo": {"zeroth_preset": "dpzo"},
    "laplace": {"zeroth_preset": "dpzo", "zeroth_noise": "laplace"},
    "dpzopo": {"zeroth_preset": "dpzopo", "train": "full"},
    "low-rank": {"zeroth_rank": 2, "train": "full"},
    "bitfit": {"train": "bitfit", "clipping": "automatic"},
    "adaptive": {"clipping": "adaptive"},
    "side": {"train": "side", "side_reduction": 2},
    "reversible": {"train": "reversible", "lora_layers": [1]},
}
BOTH = ("classification", "completion")
DEBUG = {"debug_noise_seed": 5}
REPLACE = {"neighboring_relation": "replace_one"}


def config(folder: Path, kind: str = "classification", method: str = "aggzo", **sections: Any) -> sotto.Config:
    asked = {"gradient": "zeroth_order", "zeroth_probes": 3, **METHODS[method]}
    if asked.get("zeroth_preset") in ("dpzo", "dpzopo"):
        del asked["zeroth_probes"]
    if kind == "completion" and asked.get("train") == "bitfit":
        asked["train"] = "lora"  # a Llama has no biases
    return tiny_runs.config(folder, kind, method=asked, **sections)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", BOTH)
def test_a_run_is_private_and_its_export_is_the_trained_model(tmp_path: Path, kind: str, method: str):
    done = sotto.train(config(tmp_path, kind, method))
    assert done.finished
    assert 0 < done.epsilon <= 8.0
    assert "public random direction" in done.statement
    stored = sotto.load(done.path / "model")
    ids = torch.randint(5, 40, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(stored(ids).logits, done.model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["aggzo", "dpzopo", "laplace"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    straight = sotto.train(config(tmp_path, method=method, run=DEBUG))
    stopped = config(tmp_path, method=method, run=DEBUG, output={"name": "stopped"})
    log = training.Metrics.log

    def stop_after_two(self: Any, step: int, *rest: Any) -> None:
        log(self, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Metrics, "log", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        sotto.train(stopped)
    monkeypatch.undo()
    (path,) = Path(stopped.output.dir).glob("*stopped*")
    done = sotto.resume(path)
    assert done.finished
    tiny_runs.assert_same(straight.model.state_dict(), done.model.state_dict())


def test_checkpoints_hold_numbers_and_no_weights_and_export_replays_them(tmp_path: Path):
    done = sotto.train(config(tmp_path))
    newest = max((done.path / "checkpoints").iterdir())
    assert load_file(newest / "weights.safetensors") == {}
    state = load_file(newest / "optimizer.safetensors")
    assert {name: tuple(x.shape) for name, x in state.items()} == {"log": (done.steps, 3), "start": (32,)}
    again = sotto.export(done.path, tmp_path / "elsewhere")
    tiny_runs.assert_same(sotto.load(done.path / "model").state_dict(), sotto.load(again).state_dict())
    assert sotto.resume(done.path).finished
    run = RunDir.open(done.path)
    run.write("plan.json", json.dumps({**run.read_json("plan.json"), sessions.DIRECTIONS: "00" * 16}))  # and sealed
    with pytest.raises(SottoError) as caught:
        sotto.export(done.path, tmp_path / "third")
    assert caught.value.code == "SOT656"


def test_the_noise_follows_from_nothing_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same sums, directions and configuration: the noise differs. (Released code drew it from their seed.)"""
    session = sessions.start(config(tmp_path), "run")
    assert isinstance(session.engine, ZerothOrder)
    zeros = session.engine.zeros()
    first, second = (session.mechanism.privatize(zeros, 0)[NAME] for _ in range(2))
    assert not torch.equal(first, second)
    session.held.close()
    directions = session.engine.directions
    name = next(iter(directions.shapes))
    assert torch.equal(directions.tensor(name, 0, 0), directions.tensor(name, 0, 0))


def test_weights_are_untouched_by_a_sum(tmp_path: Path):
    session = sessions.start(config(tmp_path, "completion", "low-rank"), "run")
    before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    training.clipped_sum(session, session.sampler.draw(0), 0)
    session.held.close()
    for name, p in session.model.named_parameters():
        assert torch.equal(p, before[name])


def test_an_empty_batch_takes_a_step_of_noise_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sotto.data.sampling.PoissonSampler.draw", lambda self, step, attempt=0: torch.zeros(0).numpy())
    session = sessions.start(config(tmp_path), "run")
    total = training.clipped_sum(session, session.sampler.draw(0), 0)
    released = session.mechanism.privatize(total, 0)[NAME]
    session.held.close()
    assert total.gradients[NAME].abs().sum() == 0
    assert released.abs().min() > 0
    assert len(released.unique()) == len(released)


# ---- the guarantee


def test_laplace_noise_gives_pure_epsilon(tmp_path: Path):
    done = sotto.train(config(tmp_path, method="laplace"))
    plan = make_plan(config(tmp_path, method="laplace"))
    assert plan.event == PoissonLaplace(plan.noise_multiplier, plan.sampling_prob)
    assert done.epsilon == pytest.approx(accounting.pure_epsilon([(plan.event, done.steps)]))
    facts = json.loads((done.path / "privacy.json").read_text())
    assert facts["delta"] == 0
    assert facts["noise"] == "laplace"
    assert "delta                 0   (pure)" in done.statement
    assert "an L1 norm of at most" in done.statement
    session = sessions.start(config(tmp_path, method="laplace", output={"name": "other"}), "run")
    session.held.close()
    assert isinstance(session.mechanism, LaplaceMechanism)
    assert "except with probability" not in done.statement


def test_the_number_of_probes_is_free(tmp_path: Path):
    few, many = (make_plan(config(tmp_path).with_overrides([f"method.zeroth_probes={k}"])) for k in (1, 64))
    assert few.noise_multiplier == many.noise_multiplier
    assert few.event == many.event
    assert (few.probes, many.probes) == (1, 64)


def test_replacing_a_record_takes_more_noise(tmp_path: Path):
    """DPZero as published: sensitivity 2C. Twice the noise at most; somewhat less where batches are sampled."""
    dpzo = make_plan(config(tmp_path, method="dpzo", privacy={"epsilon": 0.5}))
    asked = {"gradient": "zeroth_order", "zeroth_preset": "dpzero"}
    dpzero = make_plan(tiny_runs.config(tmp_path, method=asked, privacy={"epsilon": 0.5, **REPLACE}))
    assert 1.5 < dpzero.noise_multiplier / dpzo.noise_multiplier <= 2.001


@pytest.mark.parametrize("method", ["aggzo", "laplace"])
def test_an_audit_finds_no_more_than_was_promised(tmp_path: Path, seeded: Any, method: str):
    wide = config(tmp_path, method=method, privacy={"num_units": 60}, run={"steps": 3})
    report = audit_mechanism(wide, canaries=300)
    assert not report.bug
    assert max(b.epsilon for b in report.bounds) <= report.claimed


def test_an_audit_notices_noise_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make = sessions.make_mechanism

    def quiet(asked: Any, plan: Any, *rest: Any) -> Any:
        made = make(asked, plan, *rest)
        made.noise_multiplier /= 10
        return made

    monkeypatch.setattr(sessions, "make_mechanism", quiet)
    assert audit_mechanism(config(tmp_path, privacy={"epsilon": 1.0}, run={"steps": 3}), canaries=600).bug


def test_a_resumed_run_keeps_its_probes_and_noise(tmp_path: Path):
    session = sessions.start(config(tmp_path), "run")
    session.held.close()
    for key, value in (("zeroth_probes", 4), ("zeroth_noise", "laplace"), ("gradient", "ghost")):
        path = session.run.path / "config.yaml"
        text = path.read_text()
        asked = sotto.Config.load(path).with_overrides([f"method.{key}={value}"])
        import yaml

        path.write_text(yaml.safe_dump(asked.to_dict()))
        with pytest.raises(SottoError) as caught:
            sotto.resume(session.run.path)
        assert caught.value.code == "SOT514"
        path.write_text(text)


# ---- data-free masks


def test_the_mask_is_the_same_for_any_data_and_keeps_its_part(tmp_path: Path):
    a, b = (
        sessions.start(config(tmp_path, method="dpzopo", output={"name": name}), "run").engine.directions.masks
        for name in ("a", "b")
    )
    assert a.keys() == b.keys()
    for name, mask in a.items():
        assert torch.equal(mask, b[name])
    (new,) = [name for name in a if name.endswith("classifier.weight")]
    assert a.pop(new).all()
    kept, size = sum(int(m.sum()) for m in a.values()), sum(m.numel() for m in a.values())
    assert kept == max(1, round(0.01 * size))


def test_the_lowest_scores_are_kept():
    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(logits=(self.a**2).sum())

    net = Chain()  # scores |a * 2a| = 2, 8, and 0, through which nothing flows
    assert masks(net, dict(net.named_parameters()), 0.34)["a"].tolist() == [True, False, False]
    assert masks(net, dict(net.named_parameters()), 0.67)["a"].tolist() == [True, True, False]


def test_a_last_layer_of_zeros_is_kept_and_hides_no_layer_below():
    class Classifier(torch.nn.Module):
        def __init__(self, last: torch.Tensor) -> None:
            super().__init__()
            self.below, self.last = torch.nn.Parameter(torch.tensor([3.0, -1.0, 2.0, 0.5])), torch.nn.Parameter(last)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.last @ self.below)

    found = masks(new := Classifier(torch.zeros(2, 4)), dict(new.named_parameters()), 0.5)
    assert found["below"].tolist() == [False, True, False, True], "the lowest scores"
    assert found["last"].all()
    old = Classifier(torch.ones(2, 4))
    assert not masks(old, dict(old.named_parameters()), 0.5)["last"].all()
    only = {"last": new.last}
    assert masks(new, only, 0.5)["last"].all()


# ---- the default


@pytest.mark.parametrize("train", ["head", "lora", "bitfit", "full"])
def test_the_directions_of_a_classifier_add_up_to_zero_over_the_classes(tmp_path: Path, train: str):
    asked = tiny_runs.config(tmp_path, method={"gradient": "zeroth_order", "train": train})
    parts = sessions.load_parts(asked, "00" * 16)
    assert isinstance(parts.engine, ZerothOrder)
    directions = parts.engine.directions
    last = [name for name in directions.shapes if "classifier" in name]
    assert sorted(directions.classes) == sorted(last)
    assert {directions.shapes[name][0] for name in last} == {3}
    for name in last:
        assert float(directions.tensor(name, 1, 3).sum(0).abs().max()) < 1e-6
    batch = training.batch_of(parts, parts.data.units.members_of(np.arange(4))[0])  # type: ignore[arg-type]
    names = dict(parts.model.named_parameters())
    before = parts.engine.prober.forward(batch).detach()
    with torch.no_grad():
        for name in last:  # the same for all classes: what no direction does
            names[name] += torch.randn(names[name].shape[1:])
    torch.testing.assert_close(parts.engine.prober.forward(batch).detach(), before, rtol=1e-4, atol=1e-4)


def test_other_directions_are_left_as_they_are(tmp_path: Path):
    for kind, method in (("completion", {}), ("classification", {"zeroth_preset": "dpzo"})):
        asked = tiny_runs.config(tmp_path, kind, method={"gradient": "zeroth_order", **method})
        engine = sessions.load_parts(asked, "00" * 16).engine
        assert isinstance(engine, ZerothOrder)
        assert not engine.directions.classes


def test_several_directions_take_one_pass_each_and_a_single_one_takes_two(tmp_path: Path):
    for method, passes in (
        ({}, 16),
        ({"zeroth_probes": 3}, 3),
        ({"zeroth_probes": 1}, 2),
        ({"zeroth_preset": "dpzo"}, 2),
    ):
        asked = tiny_runs.config(tmp_path, method={"gradient": "zeroth_order", **method})
        planned = sotto.plan(asked)
        engine = sessions.load_parts(asked, "00" * 16).engine
        assert isinstance(engine, ZerothOrder)
        assert planned.passes == engine.directions.passes == passes
        forwards = passes * planned.steps * planned.expected_batch_size
        assert f"about {forwards:,} forward passes" in plan_text.render(planned)


def test_the_default_is_sgd_at_a_rate_that_goes_with_the_clip_norm(tmp_path: Path):
    run: dict[str, Any] = {"learning_rate": ...}
    asked = tiny_runs.config(tmp_path, method={"gradient": "zeroth_order", "train": "head", "clip_norm": 2.0}, run=run)
    assert (asked.stepping.optimizer, asked.stepping.learning_rate) == ("sgd", 0.25)
    assert "sgd, learning rate 0.25 = 0.5 / clip_norm" in plan_text.render(sotto.plan(asked))
    other = asked.with_overrides(["run.optimizer=adamw"])
    assert (other.stepping.optimizer, other.stepping.learning_rate) == ("adamw", 1e-3)
    assert tiny_runs.config(tmp_path, run=run).stepping.optimizer == "adamw"
    assert asked.with_overrides(["run.learning_rate=0.1"]).stepping.learning_rate == 0.1
    for changes, rate in [("zeroth_probes=4", 1 / 16), ("zeroth_probes=64", 1.0), ("zeroth_preset=dpzo", 1 / 64)]:
        assert asked.with_overrides([f"method.{changes}"]).stepping.learning_rate == rate, changes


# ---- what is refused


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"zeroth_probes": 0}}, "zeroth_probes"),
        ({"method": {"zeroth_smoothing": -1e-3}}, "zeroth_smoothing"),
        ({"method": {"dropout": True}}, "dropout"),
        ({"method": {"zeroth_sides": 3}}, "even number"),
        ({"method": {"zeroth_rank": 2, "zeroth_directions": "sphere"}}, "zeroth_rank"),
        ({"method": {"zeroth_preset": "dpzopo", "train": "lora"}}, "train: full"),
        ({"method": {"zeroth_preset": "dpzero"}, "privacy": REPLACE}, "one direction"),
        ({"method": {"zeroth_preset": "dpzero", "zeroth_probes": ...}}, "replace_one"),
        ({"method": {"zeroth_noise": "laplace"}, "privacy": REPLACE}, "add_or_remove_one"),
        ({"method": {"zeroth_noise": "laplace", "clipping": "adaptive"}}, "fixed bounds"),
        ({"method": {"side_cache": True, "train": "side"}}, "side_cache"),
        ({"method": {"zeroth_preset": "agzo"}}, "zeroth_preset"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, sections: dict[str, Any], words: str):
    asked = {"gradient": "zeroth_order", "zeroth_probes": 3} | sections.pop("method")
    with pytest.raises(SottoError, match=words):
        tiny_runs.config(tmp_path, method=asked, **sections)


# ---- what a plan says


def said(folder: Path, run: dict[str, Any], **method: Any) -> str:
    asked = {"gradient": "zeroth_order", "train": "full", **method}
    return plan_text.render(sotto.plan(tiny_runs.config(folder, method=asked, run={"steps": 2, **run})))


def test_a_plan_says_when_a_step_is_more_noise_than_signal(tmp_path: Path):
    """The bound is rigorous: the mean of vectors no longer than C is no longer than C, and the noise is known."""
    planned = sotto.plan(tiny_runs.config(tmp_path, method={"gradient": "zeroth_order", "train": "full"}))
    longest = planned.expected_batch_size / planned.noise_multiplier / planned.probes**0.5
    assert f"at most {longest:.1f} times its noise" in plan_text.render(planned)
    assert "more noise than signal" not in said(tmp_path, {}, zeroth_probes=1)
    assert "more noise than signal" in said(tmp_path, {"steps": 900, "expected_batch_size": 1}, zeroth_probes=64)


def test_a_plan_says_when_too_few_directions_are_looked_at(tmp_path: Path):
    assert "2 directions of" in said(tmp_path, {}, zeroth_probes=1)
    assert "directions of" not in said(tmp_path, {"steps": 10}, zeroth_probes=100)
    assert "directions of" not in said(tmp_path, {}, zeroth_probes=64, train="head"), "more than there are weights"

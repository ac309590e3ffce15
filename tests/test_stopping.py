"""A run that public text ends: where it ends, what it costs, and that nothing else decides."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import yaml

import sotto
from sotto import commands, stopping
from sotto import session as sessions
from sotto.config import Config
from sotto.errors import BudgetExceeded, SottoError
from sotto.metrics import Metrics
from sotto.privacy import bounds
from sotto.privacy.ledger import Ledger
from sotto.reporting import ledger_text, plan_text, progress
from sotto.rundir import RunDir
from sotto.training import train_loop

STEPS = 40
NO_RULE: dict[str, Any] = {"patience": ..., "look_every": ...}
METHODS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "layer by layer": {"gradient": "layerwise"},
    "side": {"train": "side"},
    "side, stored": {"train": "side", "side_cache": True},
    "adapters": {"train": "lora"},
    "adaptive": {"clipping": "adaptive"},
    "zeroth order": {"gradient": "zeroth_order", "train": "head", "zeroth_probes": 4},
}


def settings(
    folder: Path, kind: str = "classification", seed: int | None = 5, **changes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """A run that looks at public text after each step, and is too fast for it not to get worse at times."""
    public = tiny_runs.write_csv(folder / "public.csv", tiny_runs.rows(20, seed=9))
    if kind != "classification":
        public = tiny_runs.write_jsonl(folder / "public.jsonl", tiny_runs.rows(20, seed=9))
    run = {"steps": STEPS, "patience": 2, "look_every": 1, "learning_rate": 0.3, "optimizer": "sgd"}
    if seed is not None:
        run["debug_noise_seed"] = seed
    base = {"data": {"public": str(public)}, "run": run, "method": {"clip_norm": 1.0}}
    return tiny_runs.merge(base, changes)


def config(folder: Path, kind: str = "classification", seed: int | None = 5, **changes: dict[str, Any]) -> Config:
    return tiny_runs.config(folder, kind, **settings(folder, kind, seed, **changes))


def seen(run: Path) -> list[float]:
    """Losses on public text, as they were published."""
    lines = map(json.loads, (run / "metrics.public.jsonl").read_text().splitlines())
    return [line["public_loss"] for line in lines if "public_loss" in line]


def steps_by_hand(losses: list[float], patience: int, every: int, steps: int) -> int:
    """Where a run ends that saw these losses."""
    for look in range(1, len(losses) + 1):
        before = losses[: max(0, look - patience)]
        if before and all(not loss < min(before) for loss in losses[look - patience : look]):
            return look * every
    return steps


def book(run: Path) -> Ledger:
    return Ledger.open(json.loads((run / "private" / "secrets.json").read_text())["ledger"])


# ---- where it ends


@pytest.mark.parametrize("method", METHODS)
def test_it_ends_where_the_published_losses_say(tmp_path: Path, method: str) -> None:
    made = config(tmp_path, method=METHODS[method], run={"ema_decay": 0.5})
    done = sotto.train(made)
    losses = seen(done.path)
    assert done.finished
    assert len(losses) == done.steps < STEPS
    assert done.steps == steps_by_hand(losses, 2, 1, STEPS)
    assert "data.public" in done.notes[-1]
    scored = commands.evaluate(done.path, made.data.public)
    assert losses[-1] == pytest.approx(scored["loss"], rel=1e-4), "it looked at other weights than it released"


@pytest.mark.parametrize("kind", ["completion", "plain_text"])
def test_text_without_labels_ends_a_run_as_well(tmp_path: Path, kind: str) -> None:
    made = config(tmp_path, kind, run={"look_every": 3, "learning_rate": 1.0})
    done = sotto.train(made)
    losses = seen(done.path)
    assert done.steps == steps_by_hand(losses, 2, 3, STEPS) == 3 * len(losses) < STEPS
    assert losses[-1] == pytest.approx(commands.evaluate(done.path, made.data.public)["nats_per_token"], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_that_is_not_met_changes_nothing(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping.StopRule, "met", False)
    run = {"steps": 6, "ema_decay": 0.5}
    alone = config(tmp_path, method=METHODS[method], data={"public": ...}, run=run | NO_RULE)
    watched = config(tmp_path, method=METHODS[method], run=run | {"patience": 4, "learning_rate": 1e-3})
    alone = alone.with_overrides(["run.learning_rate=1e-3"])
    expected, found = sotto.train(alone), sotto.train(watched)
    assert found.steps == 6 == len(seen(found.path))
    tiny_runs.assert_same(tiny_runs.final_weights(expected.path), tiny_runs.final_weights(found.path))


def test_a_loss_that_is_no_number_is_no_better() -> None:
    rule = stopping.StopRule(None, 1, 2, 1)  # type: ignore[arg-type]
    losses = iter([math.nan, 1.0, math.nan, math.inf])
    session: Any = type("", (), {"step": 1, "config": type("", (), {"run": type("", (), {"ema_decay": 0})})})()
    session.engine = type("", (), {"parameters": {}, "paused": staticmethod(_nothing)})()
    session.optimizer = type("", (), {"final_weights": staticmethod(dict)})()
    rule._loss = lambda session: next(losses)  # type: ignore[method-assign]
    waited = [(rule.look(session), rule.waited)[1] for _ in range(4)]
    assert waited == [1, 0, 1, 2]
    assert rule.met
    assert rule.best == 1.0


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_a_look_needs_no_private_text(tmp_path: Path) -> None:
    """Whatever the private text, its batches and its sums are: the rule gets the weights and the public text."""
    session = sessions.start(config(tmp_path), "run")
    assert session.rule is not None
    with session.held:
        session.step = 1
        expected = session.rule.look(session)
        other = dataclasses.replace(session, data=session.rule.text, sampler=None, mechanism=None, rule=None)  # type: ignore[arg-type]
        rule = dataclasses.replace(session.rule, best=math.inf, waited=0)
        assert rule.look(other) == expected
    session.engine.detach()


def test_the_size_of_a_look_does_not_follow_the_private_text(tmp_path: Path) -> None:
    """Out of memory halves the microbatch, which depends on the batch; the last bits of a loss must not."""
    session = sessions.start(config(tmp_path), "run")
    assert session.rule is not None
    with session.held:
        session.step = 1
        first = session.rule.look(session)
        session.microbatch_size = 1
        assert session.rule.look(session) == first
    session.engine.detach()


# ---- what it costs


def test_why_the_steps_that_were_taken_are_not_the_price() -> None:
    """Gaussian releases, and a rule that ends where they tell two datasets apart: is (epsilon, delta) kept?

    Under the first dataset the privacy loss after t steps is a sum of t normals of mean mu^2 / 2 and variance mu^2.
    The epsilon of all steps holds for the cut transcript; that of the steps taken lets through several times delta.
    """
    steps, mu, delta, runs = 40, 0.2, 0.02, 100_000
    generator = np.random.default_rng(7)
    loss_RT = generator.normal(mu**2 / 2, mu, (runs, steps)).cumsum(1)
    epsilon_T = np.array([bounds.gaussian_epsilon(mu * math.sqrt(t), delta) for t in range(1, steps + 1)])
    ends = np.where((loss_RT > epsilon_T).any(1), (loss_RT > epsilon_T).argmax(1), steps - 1)
    loss_R = loss_RT[np.arange(runs), ends]

    def broken(epsilon: Any) -> float:
        """The delta that an epsilon needs."""
        return float(np.clip(1 - np.exp(epsilon - loss_R), 0, None).mean())

    assert ends.mean() < steps - 2
    assert broken(epsilon_T[-1]) < delta
    assert broken(epsilon_T[ends]) > 1.5 * delta


def test_all_planned_steps_are_charged_and_stated(tmp_path: Path) -> None:
    made = config(tmp_path, seed=None)
    sotto.ledger(made, epsilon=8.5)
    plan, done = sotto.plan(made), sotto.train(made)
    assert done.steps < STEPS
    assert plan.total_steps > STEPS
    assert done.epsilon == plan.planned_epsilon == plan.epsilon_after(plan.total_steps) <= 8.0
    assert done.epsilon > plan.epsilon_after(done.steps) + 1  # what does not hold, and must not be claimed
    facts, record = json.loads((done.path / "privacy.json").read_text()), book(done.path).runs[done.path.name]
    assert facts["steps"] == record.reserved == done.steps
    assert facts["steps_charged"] == record.charged == plan.total_steps
    assert facts["dataset_epsilon"] == facts["epsilon"]
    assert record.closed
    assert (facts["patience"], facts["look_every"]) == (2, 1)
    words = " ".join((done.statement or "").split())
    assert f"all {plan.total_steps} steps that it might have taken are charged" in words
    assert "lost and done again" not in words
    assert f"Each of {done.steps} steps drew" in words
    page = (done.path / "report.html").read_text()
    assert "might have taken are charged" in page
    assert "Epsilon spent after each step" not in page
    assert "not taken" in ledger_text.render(sotto.ledger(made))
    with pytest.raises(BudgetExceeded):  # nothing of what was not taken has become free
        sotto.train(made)


def test_a_run_that_does_not_end_early_costs_the_same(tmp_path: Path) -> None:
    """Whether it ended early tells of the data too, so there is one price."""
    made = config(tmp_path, seed=None, run={"steps": 6, "patience": 4, "learning_rate": 1e-3})
    done = sotto.train(made)
    plan = sotto.plan(made)
    assert done.epsilon == plan.epsilon_after(plan.total_steps)
    assert book(done.path).runs[done.path.name].charged == plan.total_steps


def test_a_plan_says_it(tmp_path: Path) -> None:
    made = sotto.plan(config(tmp_path, seed=None))
    assert "all of them count" in plan_text.render(made)
    assert "whenever it ends" in plan_text.render(made)
    assert len({progress.spending_curve(made)(step) for step in (1, 10, STEPS)}) == 1
    other = sotto.plan(config(tmp_path, seed=None, data={"public": ...}, run=NO_RULE))
    assert "all of them count" not in plan_text.render(other)
    assert len({progress.spending_curve(other)(step) for step in (1, 10, STEPS)}) == 3
    assert made.noise_multiplier == other.noise_multiplier, "the noise is for the planned steps, rule or not"
    assert made.planned_epsilon is not None
    assert other.planned_epsilon is not None
    assert made.planned_epsilon > other.planned_epsilon


def test_a_run_without_a_guarantee_ends_early_too(tmp_path: Path) -> None:
    done = sotto.train(config(tmp_path, privacy={"epsilon": "none"}, run={"learning_rate": 30.0}))
    assert done.steps < STEPS
    assert done.statement is None
    assert sotto.resume(done.path).steps == done.steps


# ---- a run that is stopped on the way


def stopped_at(folder: Path, step: int, **changes: Any) -> Path:
    session = sessions.start(config(folder, **changes), "run")
    metrics = Metrics(session.run.path)
    session.progress = lambda done, values: setattr(session, "stop_requested", done == step)
    with session.held:
        finished = train_loop(session, metrics)
    metrics.close()
    session.engine.detach()
    assert not finished
    assert session.step == step
    return session.run.path


@pytest.mark.parametrize("method", ["all weights", "zeroth order"])
def test_it_ends_at_the_same_step_wherever_it_was_stopped(tmp_path: Path, method: str) -> None:
    changes: dict[str, Any] = {"method": METHODS[method], "run": {"ema_decay": 0.5, "patience": 3}}
    undisturbed = sotto.train(config(tmp_path, **changes))
    assert undisturbed.steps > 3
    for step in range(1, undisturbed.steps):
        run = stopped_at(tmp_path, step, **changes)
        again = sotto.resume(run)
        assert again.steps == undisturbed.steps
        assert seen(run) == seen(undisturbed.path)
        tiny_runs.assert_same(tiny_runs.final_weights(undisturbed.path), tiny_runs.final_weights(run))


@pytest.mark.parametrize("kill_at", [22, 31, 40, 52, 65])
def test_killed_at_any_moment_it_ends_at_the_same_step(tmp_path: Path, kill_at: int) -> None:
    undisturbed = sotto.train(config(tmp_path, run={"patience": 3}))
    (tmp_path / "killed").mkdir()
    path = tiny_runs.write_yaml(tmp_path / "killed", **settings(tmp_path, run={"patience": 3}))
    process = tiny_runs.command(tmp_path / "killed", "train", path, kill_at=kill_at)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "killed" / "output").read_text()
    again = sotto.resume(tiny_runs.only_run(tmp_path / "killed"))
    assert again.steps == undisturbed.steps
    tiny_runs.assert_same(tiny_runs.final_weights(undisturbed.path), tiny_runs.final_weights(again.path))


def test_steps_that_were_done_again_cost_no_more_than_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path, seed=None, run={"spare_steps": 5})
    with monkeypatch.context() as patch:
        patch.setattr("sotto.training.save_checkpoint", lambda session: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sotto.train(made)
    again = sotto.resume(tiny_runs.only_run(tmp_path))
    record = book(again.path).runs[again.path.name]
    assert record.reserved == again.steps + 1
    assert record.charged == STEPS + 5
    assert again.epsilon == sotto.plan(made).planned_epsilon


def test_what_was_seen_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above: a rule that forgets ends later."""
    undisturbed = sotto.train(config(tmp_path))
    run = stopped_at(tmp_path, undisturbed.steps - 1)
    monkeypatch.setattr(stopping.StopRule, "restore", lambda self, state: None)
    assert sotto.resume(run).steps > undisturbed.steps


def test_killed_after_the_last_step_it_takes_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path, seed=None)
    with monkeypatch.context() as patch:
        patch.setattr("sotto.finish.finish", lambda session: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sotto.train(made)
    run = tiny_runs.only_run(tmp_path)
    taken = book(run).reserved(run.name)
    again = sotto.resume(run)
    assert again.steps == taken == book(run).reserved(run.name) < STEPS
    assert again.epsilon == sotto.plan(made).planned_epsilon


def test_a_signal_at_the_last_step_is_no_interruption(tmp_path: Path) -> None:
    undisturbed = sotto.train(config(tmp_path)).steps
    session = sessions.start(config(tmp_path), "run")
    session.progress = lambda done, values: setattr(session, "stop_requested", done == undisturbed)
    done = commands.run_session(session, session.progress)
    assert done.finished
    assert done.steps == undisturbed


def test_other_public_text_at_a_resume_is_refused(tmp_path: Path) -> None:
    run = stopped_at(tmp_path, 2)
    values = yaml.safe_load((run / "config.yaml").read_text())
    other = tiny_runs.write_csv(tmp_path / "other.csv", tiny_runs.rows(20, seed=10))
    moved = Path(values["data"]["public"]).rename(tmp_path / "moved.csv")
    for name in (other, moved):
        values["data"]["public"] = str(name)
        (run / "config.yaml").write_text(yaml.safe_dump(values))
        if name == other:
            with pytest.raises(SottoError, match="SOT507") as caught:
                sotto.resume(run)
            assert "public text" in str(caught.value)
    assert sotto.resume(run).finished


# ---- bad input


def test_the_protected_text_is_no_public_text(tmp_path: Path) -> None:
    own = config(tmp_path).data.train
    mostly = str(tiny_runs.write_csv(tmp_path / "mostly.csv", tiny_runs.rows()[:60] + tiny_runs.rows(10, seed=9)))
    copied = str(tiny_runs.write_csv(tmp_path / "copied.csv"))
    for name in (own, copied, mostly):
        with pytest.raises(SottoError, match="SOT937") as caught:
            sotto.train(config(tmp_path, data={"public": name}))
        assert caught.value.where == "data.public"
    few = str(tiny_runs.write_csv(tmp_path / "few.csv", tiny_runs.rows()[:5] + tiny_runs.rows(20, seed=9)))
    sessions.load_parts(config(tmp_path, data={"public": few}), "key")
    assert not (tmp_path / "runs").exists()


def test_held_out_text_is_no_public_text(tmp_path: Path) -> None:
    public = config(tmp_path).data.public
    copied = str(tiny_runs.write_csv(tmp_path / "copied.csv", tiny_runs.rows(20, seed=9)))
    other = str(tiny_runs.write_csv(tmp_path / "held.csv", tiny_runs.rows(20, seed=11)))
    for name in (public, copied):
        with pytest.raises(SottoError, match="SOT215"):
            sotto.train(config(tmp_path, data={"eval": name}))
    sessions.load_parts(config(tmp_path, data={"eval": other}), "key")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"public": ...}}, "need each other"),
        ({"run": {"patience": ...}}, "need each other"),
        ({"data": {"public": ...}, "run": {"patience": ...}}, "need each other"),
        ({"run": {"patience": 0}}, "patience"),
        ({"run": {"patience": STEPS - 1}}, "end no shorter run"),
        ({"run": {"look_every": 20}}, "end no shorter run"),
        ({"setting": {"kind": "federated"}}, "setting.kind: central"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(SottoError, match=said):
        config(tmp_path, **changes)


def test_public_text_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SottoError, match="SOT200"):
        sotto.train(config(tmp_path, data={"public": str(tmp_path / "nowhere.csv")}))


def test_the_default_is_twenty_looks(tmp_path: Path) -> None:
    made = config(tmp_path, run={"look_every": ..., "steps": 60})
    assert made.stepping.look_every == 3
    assert sotto.plan(made).look_every == 3
    assert RunDir.open(sotto.train(made).path).plan().look_every == 3

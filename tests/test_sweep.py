"""Choosing the best of several trainings: its price, what it releases, and what it does not."""

from __future__ import annotations

import itertools
import json
import math
import random
import stat
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_runs
from scipy import stats

import sotto
from sotto import cli, commands, session, sweeping
from sotto.errors import SottoError
from sotto.privacy import accounting, selection, statement
from sotto.privacy.accounting import PoissonGaussian
from sotto.privacy.ledger import Ledger
from sotto.privacy.plan import make_plan

EVENT = PoissonGaussian(1.0, 0.01)

# ---- the price


@pytest.mark.parametrize(
    ("law", "mean", "golden"),
    [("geometric", 10, 4.103271), ("logarithmic", 10, 3.522633), ("geometric", 100, 5.270022)],
)
def test_golden_values(law: Any, mean: float, golden: float):
    found = selection.epsilon(EVENT, 1000, 1e-5, mean, law)
    assert golden - 1e-6 <= found <= golden * 1.001


def slow_bound(sigma: float, steps: int, delta: float, mean: float, shape: float) -> float:
    """Theorem 2 of Papernot and Steinke by hand, for the Gaussian mechanism, whose Renyi divergence is known.

    RDP of the choice at order a: e(a) + (1 + shape) (1 - 1/b) e(b) + (1 + shape) log(1/g) / b + log(mean) / (a - 1),
    for every order b; g is the law's parameter: 1/mean, or for the logarithmic one that of its mean.
    """
    orders = np.concatenate([np.linspace(1.05, 12, 200), np.arange(13, 400)])

    def renyi(order: np.ndarray) -> np.ndarray:
        return order * steps / (2 * sigma**2)

    gamma = 1 / mean if shape == 1 else 1 - selection.logarithmic_parameter(mean)
    extra = ((1 + shape) * ((1 - 1 / orders) * renyi(orders) + math.log(1 / gamma) / orders)).min()
    total = renyi(orders) + extra + math.log(mean) / (orders - 1)
    convert = np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return float((total + convert).min())


@pytest.mark.parametrize("law", ["geometric", "logarithmic"])
@pytest.mark.parametrize("mean", [2.0, 7.0, 40.0])
def test_the_price_is_that_of_the_theorem(law: Any, mean: float):
    sigma, steps, delta = 20.0, 100, 1e-5
    by_hand = slow_bound(sigma, steps, delta, mean, selection.SHAPES[law])
    assert selection.epsilon(PoissonGaussian(sigma, 1.0), steps, delta, mean, law) == pytest.approx(by_hand, rel=0.01)


def test_a_choice_costs_more_than_one_trial_and_less_than_all():
    one = accounting.epsilon(1.0, 0.01, 1000, 1e-5, accountant="rdp")
    costs = [selection.epsilon(EVENT, 1000, 1e-5, mean) for mean in (1.5, 3, 10, 30)]
    assert costs == sorted(costs)
    assert one < costs[0]
    assert costs[2] < accounting.epsilon(1.0, 0.01, 10_000, 1e-5)


def test_the_price_covers_the_spare_steps_of_every_trial(tmp_path: Path):
    """A trial that a crash interrupts takes them, and is still within what was paid for."""
    run = {"steps": 40, "spare_steps": 40}
    config = tiny_runs.config(tmp_path, run=run, data={"eval": "none.csv"})
    planned, trial = sweeping.plan_sweep(config, {"run.learning_rate": ["1e-3", "3e-3"]})
    plan = make_plan(trial)
    assert plan.total_steps == 80
    event = PoissonGaussian(plan.noise_multiplier, plan.sampling_prob)
    asked = (plan.delta, planned.mean, planned.law)
    assert planned.epsilon >= selection.epsilon(event, plan.total_steps, *asked) * (1 - 1e-9)
    assert planned.epsilon > 1.1 * selection.epsilon(event, plan.steps, *asked), "the twin"
    assert planned.epsilon <= config.privacy.epsilon


def test_the_noise_is_the_least_that_fits():
    noise = selection.noise_multiplier(3.0, 0.05, 200, 1e-5, 5.0)
    assert selection.epsilon(PoissonGaussian(noise, 0.05), 200, 1e-5, 5.0) <= 3.0
    assert selection.epsilon(PoissonGaussian(noise * 0.995, 0.05), 200, 1e-5, 5.0) > 3.0


@pytest.mark.parametrize("law", ["geometric", "logarithmic"])
def test_the_number_of_trials_follows_its_law(law: Any):
    mean, uniforms = 4.0, (np.arange(40_000) + 0.5) / 40_000
    drawn = np.array([selection.draw_trials(mean, law, u) for u in uniforms])
    assert drawn.min() == 1
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    if law == "geometric":
        assert (drawn == 1).mean() == pytest.approx(1 / mean, abs=1e-3)
        assert (drawn > 3).mean() == pytest.approx((1 - 1 / mean) ** 3, abs=1e-3)
    else:
        p = selection.logarithmic_parameter(mean)
        assert (drawn == 2).mean() / (drawn == 1).mean() == pytest.approx(p / 2, rel=0.01)


def best_of(count: int, epsilon: float, truth: bool) -> float:
    """The chance that the best of `count` randomised responses, judged by a score that likes True, is True."""
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    return 1 - (1 - (right if truth else 1 - right)) ** count


def test_a_fixed_number_of_trials_has_a_loss_that_a_random_one_has_not():
    """Pure randomised response: with a geometric number the loss of the best is at most 3 epsilon (Liu and Talwar);
    with a fixed number of the same mean it is larger, which is why that has no bound here."""
    epsilon, mean = 0.2, 8

    def loss(chance: Any) -> float:
        ratios = (chance(True) / chance(False), (1 - chance(False)) / (1 - chance(True)))
        return max(abs(math.log(r)) for r in ratios)

    def random_number(truth: bool) -> float:
        counts = np.arange(1, 60 * mean)
        weights = (1 - 1 / mean) ** (counts - 1) / mean
        return float(sum(w * best_of(int(c), epsilon, truth) for c, w in zip(counts, weights, strict=True)))

    assert loss(random_number) <= 3 * epsilon
    assert loss(lambda truth: best_of(mean, epsilon, truth)) > 3 * epsilon


# ---- the command


def config(folder: Path, **changes: Any) -> sotto.Config:
    public = folder / "public.csv"
    tiny_runs.write_csv(public, tiny_runs.rows(10, seed=8))
    changes["data"] = {"eval": str(public), **changes.get("data", {})}
    return tiny_runs.config(folder, **changes)


OVER = {"method.clip_norm": ["0.1", "1.0"], "run.learning_rate": ["1e-3", "1e-2"]}


def test_a_sweep_releases_one_model_and_deletes_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "draw_trials", lambda mean, law: 3)
    made = config(tmp_path)
    done = sweeping.sweep(made, OVER, public_eval=True)
    facts = json.loads((done.path / "privacy.json").read_text())
    assert facts["epsilon"] <= 8.0
    assert facts["accountant"].startswith("RDP")
    assert facts["epsilon"] == pytest.approx(done_plan(made).epsilon, abs=2e-6)
    assert sotto.load(done.path / "model") is not None
    assert max(map(len, done.statement.splitlines())) <= 120
    with pytest.raises(SottoError, match=r"(?s)SOT501.*a sweep has released.*statement\.txt"):
        sotto.show(done.path)
    card = (done.path / "model" / "README.md").read_text()
    assert "SWEEP" in card
    assert sorted(p.name for p in done.path.iterdir()) == ["model", "privacy.json", "statement.txt", "sweep.json"]
    everything = b"".join(p.read_bytes() for p in done.path.rglob("*.json")) + done.statement.encode()
    assert b"accuracy" not in everything  # no score, and not how many there were
    assert tiny_runs.CANARY.encode() not in everything
    # The dataset pays for all trials.
    (book,) = (Path(p) for p in Path(sotto.privacy.ledger.ledger_dir()).glob("*.jsonl"))
    assert len(Ledger.open(book.stem).runs) == 3


def test_every_number_of_a_sweeps_statement_is_that_of_the_choice(tmp_path: Path):
    plan = make_plan(config(tmp_path))
    planned = sweeping.SweepPlan([["x=1"], ["x=2"]], 7.0, "logarithmic", 3.2001, 2e-6, 1.5, plan.noise_multiplier)
    words = " ".join(sweeping.text(planned, plan, ["x=2"]).split())
    for part in (
        "epsilon 3.201 (an upper bound, rounded up)",
        "delta 2e-06",
        f"protected unit who: {statement.who(plan)}",
        "drawn from a logarithmic law of mean 7 ",
        "drawn from 2 settings. The released one: x=2.",
        f"of {plan.steps} steps with noise multiplier {plan.noise_multiplier:.6g} and sampling probability "
        f"{plan.sampling_prob:.6g}, costs epsilon 1.500.",
    ):
        assert part in words, part
    trial = statement.machine_readable(statement.earned(plan, plan.steps, plan.steps, 9.0, 3), {})
    facts = sweeping._facts(planned, trial)
    assert (facts["epsilon"], facts["delta"], facts["selection"]["mean_trials"]) == (3.2001, 2e-6, 7.0)
    assert not [key for key in facts if "dataset" in key or "charged" in key or "mu" in key.split("_")]


def mocked(monkeypatch: pytest.MonkeyPatch, settings: list[list[str]], trials: int) -> tuple[list[Any], list[Path]]:
    """A sweep that trains nothing. Returns what numbers of trials it asks for, and what it will release."""
    asked, released, priced = list[Any](), list[Path](), SimpleNamespace(event=EVENT)
    planned = sweeping.SweepPlan(settings, 5.0, "geometric", 1.0, 1e-5, 1.0, 1.0)
    monkeypatch.setattr(sweeping, "plan_sweep", lambda made, *rest: (planned, made))
    monkeypatch.setattr(sweeping, "make_plan", lambda config: priced)
    monkeypatch.setattr(sweeping.RunDir, "open", lambda path: SimpleNamespace(plan=lambda: priced))
    monkeypatch.setattr(sweeping, "_release", lambda planned, path, *rest: (released.append(path), {}))
    monkeypatch.setattr(selection, "draw_trials", lambda *of: asked.append(of) or trials)
    return asked, released


def test_a_score_that_is_no_number_never_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The price is that of the best in one order. What has no place in it would win wherever it came first."""
    nats = {"a": math.nan, "b": 3.0, "c": math.nan, "d": 2.0, "e": 4.0}
    _, released = mocked(monkeypatch, [[]], len(nats))
    trials = iter(nats)
    monkeypatch.setattr(session, "start", lambda *arguments, **options: None)
    monkeypatch.setattr(
        commands, "run_session", lambda *arguments: SimpleNamespace(finished=True, path=Path(next(trials)))
    )
    monkeypatch.setattr(commands, "evaluate", lambda path: {"nats_per_token": nats[str(path)]})
    sweeping.sweep(config(tmp_path), OVER, public_eval=True)
    assert released == [Path("d")]


def test_trials_are_as_many_as_were_priced_and_each_draws_its_setting_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The theorem is about independent draws of one thing. Settings that took turns would be others."""
    asked, _ = mocked(monkeypatch, [["a"], ["b"], ["c"], ["d"]], 2000)
    seen: list[str] = []
    monkeypatch.setattr(sweeping, "_one", lambda trial, setting, folder: (Path(seen.append(setting[0]) or "x"), 0.0))
    for _ in range(2):
        sweeping.sweep(config(tmp_path), OVER, 7.0, "logarithmic", public_eval=True)
    assert asked == [(7.0, "logarithmic")] * 2
    assert seen[:2000] != seen[2000:]
    alone, pairs = Counter(seen), Counter(zip(seen[::2], seen[1::2], strict=True))  # no draw is in two of them
    assert stats.chisquare([alone[s] for s in "abcd"]).pvalue > 1e-6
    assert stats.chisquare([pairs[s, t] for s in "abcd" for t in "abcd"]).pvalue > 1e-6


@pytest.mark.parametrize("law", ["geometric", "logarithmic"])
def test_the_number_of_trials_is_drawn_by_the_operating_system(law: Any):
    """A number that somebody could know, or that is always the same, has no bound."""
    draws = []
    for _ in range(2):
        random.seed(0)
        draws.append([selection.draw_trials(4.0, law) for _ in range(2000)])
    assert draws[0] != draws[1]
    first = (np.array(draws) == 1).mean()
    p = selection.logarithmic_parameter(4.0)
    assert first == pytest.approx(0.25 if law == "geometric" else p / -math.log1p(-p), abs=7 * 0.5 / 4000**0.5)
    assert np.mean(draws) == pytest.approx(4.0, rel=0.25)


def test_what_is_released_does_not_tell_how_many_trials_there_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The bound is that of a number of trials which nobody learns, nor which of them was the best: here the last."""
    one, scores = sweeping._one, itertools.count()
    monkeypatch.setattr(sweeping, "_one", lambda *arguments: (one(*arguments)[0], float(next(scores))))

    def released(trials: int) -> dict[str, str]:
        folder = tmp_path / str(trials)
        folder.mkdir()
        monkeypatch.setenv("SOTTO_LEDGER_DIR", str(folder / "ledger"))
        monkeypatch.setattr(selection, "draw_trials", lambda mean, law: trials)
        done = sweeping.sweep(config(folder), {"run.learning_rate": ["1e-3"]}, public_eval=True)
        files = [p for p in done.path.rglob("*") if p.suffix in (".json", ".txt", ".md")]
        return {p.name: p.read_text().replace(done.path.name, "NAME") for p in files}

    assert released(1) == released(2)


def test_a_later_run_does_not_tell_how_many_trials_there_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The total of all runs on the data would, and their number; the owner sees both in the ledger."""

    def released(trials: int) -> dict[str, Any]:
        folder = tmp_path / str(trials)
        folder.mkdir()
        monkeypatch.setenv("SOTTO_LEDGER_DIR", str(folder / "ledger"))
        monkeypatch.setattr(selection, "draw_trials", lambda mean, law: trials)
        made = config(folder)
        if trials:
            sweeping.sweep(made, {"run.learning_rate": ["1e-3"]}, public_eval=True)
        run = sotto.train(made)
        assert len(sotto.ledger(made)["runs"]) == trials + 1
        assert run.statement in (run.path / "model" / "README.md").read_text()
        words = [line for line in run.statement.splitlines() if "same data" in line]
        report = (run.path / "report.html").read_text()
        assert ("must stay secret" in report) == ("must stay secret" in run.statement) == (trials > 0)
        return {"words": words, **json.loads((run.path / "privacy.json").read_text())}

    after = released(1)
    assert after == released(2)
    assert after["dataset_epsilon"] is after["dataset_runs"] is None
    assert released(0)["dataset_runs"] == 1


def done_plan(made: sotto.Config) -> sweeping.SweepPlan:
    return sweeping.plan_sweep(made, OVER)[0]


def test_the_trial_is_priced_for_the_choice(tmp_path: Path):
    made = config(tmp_path)
    planned, trial = sweeping.plan_sweep(made, OVER)
    assert len(planned.settings) == 4
    assert planned.epsilon <= 8.0
    assert planned.trial_epsilon < 8.0
    assert planned.noise_multiplier > sotto.plan(made).noise_multiplier
    assert sotto.plan(trial).noise_multiplier == planned.noise_multiplier


def test_trials_that_public_text_may_end_have_the_same_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A trial that was cut off is made of a whole one; each of them is charged whole."""
    monkeypatch.setattr(selection, "draw_trials", lambda mean, law: 2)
    public = str(tiny_runs.write_csv(tmp_path / "watched.csv", tiny_runs.rows(20, seed=9)))
    run = {"steps": 30, "optimizer": "sgd"}
    too_fast = {"run.learning_rate": ["0.3", "0.5", "0.7", "1.0"]}  # for 30 steps that all make it better
    watched = config(tmp_path, data={"public": public}, run=run | {"patience": 1, "look_every": 1})
    assert done_plan(watched).epsilon == done_plan(config(tmp_path, run=run)).epsilon
    facts = json.loads((sweeping.sweep(watched, too_fast, public_eval=True).path / "privacy.json").read_text())
    assert facts["steps"] < 30
    assert facts["epsilon"] == pytest.approx(done_plan(watched).epsilon, abs=2e-6)
    (book,) = (Path(p) for p in Path(sotto.privacy.ledger.ledger_dir()).glob("*.jsonl"))
    assert [run.charged for run in Ledger.open(book.stem).runs.values()] == [31, 31]


def test_private_files_are_the_owners_alone_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    def one(trial: Any, setting: list[str], folder: Path) -> Any:
        seen.append(stat.S_IMODE(folder.parent.stat().st_mode))
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "_one", one)
    with pytest.raises(KeyboardInterrupt):
        sweeping.sweep(config(tmp_path), OVER, public_eval=True)
    assert seen == [0o700]


REFUSED = [
    ({"run.expected_batch_size": ["8", "16"]}, {}, True),
    ({"privacy.epsilon": ["1", "2"]}, {}, True),
    ({"run.steps": ["1", "2"]}, {}, True),
    (OVER, {}, False),
    (OVER, {"privacy": {"epsilon": "none"}}, True),
    (OVER, {"privacy": {"neighboring_relation": "replace_one"}}, True),
    ({"method.zeroth_noise": ["gaussian", "laplace"]}, {"method": {"gradient": "zeroth_order"}}, True),
    ({"method.gradient": ["ghost", "zeroth_order"]}, {"method": {"zeroth_noise": "laplace"}}, True),
    ({"run.learning_rate": []}, {}, True),
]


@pytest.mark.parametrize(("over", "changes", "public"), REFUSED)
def test_what_has_no_bound_is_refused(
    over: Any, changes: Any, public: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def began(*_: Any) -> None:
        raise AssertionError("a trial began")

    monkeypatch.setattr(sweeping, "_one", began)
    with pytest.raises(SottoError, match="SOT495"):
        sweeping.sweep(config(tmp_path, **changes), over, public_eval=public)
    assert not (tmp_path / "runs").exists()


def test_every_trial_releases_what_was_priced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever keys differ between trials, their event is compared before one of them is released."""
    monkeypatch.setattr(selection, "draw_trials", lambda mean, law: 1)
    one = sweeping._one
    monkeypatch.setattr(sweeping, "_one", lambda trial, *rest: one(trial.with_overrides(["run.steps=2"]), *rest))
    with pytest.raises(SottoError, match=r"SOT495.*priced"):
        sweeping.sweep(config(tmp_path), {"run.learning_rate": ["1e-3"]}, public_eval=True)
    assert not list((tmp_path / "runs").glob("*/model"))


@pytest.mark.parametrize("method", ["ghost", "layerwise", "zeroth_order"])
def test_the_price_is_that_of_whatever_a_trial_trains(tmp_path: Path, method: str):
    """One plan for all settings: the same noise, sampling probability and number of steps."""
    planned, trial = sweeping.plan_sweep(config(tmp_path), {"method.gradient": ["book_keeping", method]})
    plans = [make_plan(trial.with_overrides(setting)) for setting in planned.settings]
    assert len({(plan.event, plan.total_steps, plan.delta) for plan in plans}) == 1
    assert plans[0].noise_multiplier == planned.noise_multiplier


def test_a_setting_that_is_wrong_is_refused_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(SottoError, match="clip_norm"):
        sweeping.sweep(config(tmp_path), {"method.clip_norm": ["1.0", "-1"]}, public_eval=True)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    tiny_runs.write_csv(tmp_path / "public.csv", tiny_runs.rows(10, seed=8))
    path = tiny_runs.write_yaml(tmp_path, data={"eval": str(tmp_path / "public.csv")})
    over = ["--over", "run.learning_rate=1e-3,1e-2"]
    monkeypatch.setattr("sys.argv", ["sotto", "sweep", str(path), *over, "--plan"])
    cli.main()
    assert json.loads(capsys.readouterr().out)["law"] == "geometric"
    monkeypatch.setattr(selection, "draw_trials", lambda mean, law: 1)
    monkeypatch.setattr("sys.argv", ["sotto", "sweep", str(path), *over, "--public-eval"])
    cli.main()
    assert "PRIVACY STATEMENT OF A SWEEP" in capsys.readouterr().out

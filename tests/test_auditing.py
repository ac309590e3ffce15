"""Audits: bounds that hold as often as they say, a sound run that passes, and broken ones that do not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch

import sotto
from sotto import cli
from sotto import session as sessions
from sotto.auditing import bounds, mechanism, planting
from sotto.auditing import canaries as canary_units
from sotto.auditing.bounds import clopper_pearson, gaussian, one_run, one_run_epsilon, rate_above, rate_below
from sotto.config import Config
from sotto.errors import SottoError
from sotto.gradients.clipping import Flat
from sotto.privacy import accounting
from sotto.privacy import mechanism as mechanism_module
from sotto.privacy.events import PoissonLaplace
from sotto.privacy.mechanism import GaussianMechanism
from sotto.privacy.noise import DebugNoise

DELTA = 1e-5
NORMAL = [0.5, 1.0, 2.0]


# ---- bounds


def test_figures_of_the_literature():
    """One-run: what the code of Steinke et al. (2023, appendix) gives. Clopper-Pearson of no success: 1 - a^(1/n)."""
    assert one_run_epsilon(1000, 100, 95, 1e-5) == pytest.approx(2.165176, abs=1e-5)
    assert one_run_epsilon(1000, 100, 100, 1e-5) == pytest.approx(3.465376, abs=1e-5)
    assert rate_above(0, 1000, 0.95) == pytest.approx(0.00299125, abs=1e-8)
    assert rate_above(0, 1000, 0.95) == pytest.approx(1 - 0.05 ** (1 / 1000))
    assert rate_below(1000, 1000, 0.95) == pytest.approx(0.05 ** (1 / 1000))
    assert rate_above(7, 7, 0.95) == 1.0
    assert rate_below(0, 7, 0.95) == 0.0


def test_chance_proves_nothing():
    assert one_run_epsilon(1000, 100, 50, DELTA) == 0.0
    assert one_run_epsilon(1000, 100, 0, DELTA) == 0.0
    same = np.random.default_rng(0).normal(size=(2, 4000))
    assert clopper_pearson(same[0], same[1], DELTA).epsilon < 0.3
    assert gaussian(same[0], same[1], 0.0, DELTA).epsilon < 0.3


def test_more_right_guesses_prove_more():
    found = [one_run_epsilon(1000, 200, correct, DELTA) for correct in range(100, 201, 10)]
    assert found == sorted(found)
    assert found[-1] > 3
    assert one_run_epsilon(1000, 200, 180, DELTA) > one_run_epsilon(1000, 200, 180, 1e-3)


@pytest.mark.parametrize(("guesses", "correct", "canaries"), [(5, 6, 10), (11, 5, 10), (5, -1, 10), (0, 0, 0)])
def test_counts_that_do_not_fit_together(guesses: int, correct: int, canaries: int):
    with pytest.raises(SottoError, match="SOT701"):
        one_run_epsilon(canaries, guesses, correct, DELTA)


def test_too_few_scores():
    with pytest.raises(SottoError, match="SOT702"):
        clopper_pearson(np.zeros(3), np.zeros(50), DELTA)


def gaussian_epsilon(mu: float) -> float:
    from sotto.privacy.bounds import gaussian_epsilon

    return gaussian_epsilon(mu, DELTA)


@pytest.mark.parametrize("mu", NORMAL)
def test_bounds_fail_no_more_often_than_they_say(mu: float):
    """80 attacks on a mechanism whose epsilon is known, at 90 % confidence; a right bound fails at most 22 times but
    for one chance in a hundred thousand. The twin believes in twice the noise, and fails nearly always."""
    generator, truth = np.random.default_rng(int(mu * 10)), gaussian_epsilon(mu)
    wrong = {"gaussian": 0, "clopper_pearson": 0, "one_run": 0, "sampled_gaussian": 0}
    twin = 0
    for _ in range(80):
        inside, outside = generator.normal(mu, 1, 400), generator.normal(0, 1, 400)
        found = [
            gaussian(inside, outside, mu / 2, DELTA, 0.9),
            clopper_pearson(inside, outside, DELTA, 0.9),
            one_run(inside, outside, DELTA, 0.9),
            bounds.sampled_gaussian(inside / mu, outside / mu, 1, 1.0, DELTA, 0.9),
        ]
        for bound in found:
            wrong[bound.method] += bound.epsilon > truth
        twin += found[0].epsilon > gaussian_epsilon(mu / 2)
    assert max(wrong.values()) <= 22, wrong
    assert twin >= 60 or mu < 1


@pytest.mark.parametrize(("members", "others"), [(20_000, 40), (40, 20_000)])
def test_bounds_hold_where_one_kind_of_scores_is_few(members: int, others: int):
    """As above: then all of the doubt is about the noise, or all of it about what members add."""
    generator, truth, wrong = np.random.default_rng(members), gaussian_epsilon(1.0), [0, 0]
    for _ in range(80):
        inside, outside = generator.normal(1, 1, members), generator.normal(0, 1, others)
        wrong[0] += bounds.sampled_gaussian(inside, outside, 1, 1.0, DELTA, 0.9).epsilon > truth
        wrong[1] += gaussian(inside, outside, 0.5, DELTA, 0.9).epsilon > truth
    assert max(wrong) <= 22


def test_what_delta_allows_proves_no_epsilon():
    """Publishing one unit in ten outright is (0, 0.1)-DP, and at a smaller delta it has no epsilon."""
    inside, outside = (np.arange(4000) % 20 < 2).astype(float), np.zeros(4000)
    assert clopper_pearson(inside, outside, 0.1).epsilon == 0.0
    assert clopper_pearson(inside, outside, 0.01).epsilon > 2.0


@pytest.mark.parametrize(("scale", "steps", "sampling_prob"), [(0.25, 1, 1.0), (2.0, 20, 0.3), (4.0, 50, 0.2)])
def test_the_bound_from_laplace_noise_fails_no_more_often_than_it_says(scale: float, steps: int, sampling_prob: float):
    """As above, at 90 %. The twin has half of the noise that it accounts for, and is nearly always refuted."""
    generator, wrong, refuted, found = np.random.default_rng(4), 0, 0, []
    truth = accounting.pure_epsilon([(PoissonLaplace(scale, sampling_prob), steps)])
    for _ in range(80):
        member = generator.laplace(0, scale, (600, steps)) + (generator.random((600, steps)) < sampling_prob)
        other = generator.laplace(0, scale, (600, steps))
        arguments = (steps, sampling_prob, 0.9)
        found.append(bounds.sampled_laplace(member.sum(1), np.abs(other).sum(1), *arguments).epsilon)
        less = bounds.sampled_laplace(member.sum(1), np.abs(other).sum(1) / 2, *arguments)
        wrong, refuted = wrong + (found[-1] > truth), refuted + (less.epsilon > truth)
    assert wrong <= 22
    assert refuted >= 60
    assert np.median(found) > (0.8 if steps == 1 else 0.3) * truth


def test_rates_of_attacks():
    inside, outside = np.array([3.0, 2.0, 2.0]), np.array([2.0, 1.0, 0.0, -1.0])
    assert bounds.area_under_curve(inside, outside) == pytest.approx((4 + 3.5 + 3.5) / 12)
    assert bounds.true_positives_at(inside, outside, 0.0) == pytest.approx(1 / 3)
    assert bounds.true_positives_at(inside, outside, 0.25) == 1.0


def test_what_an_attack_can_reach():
    assert bounds.true_positives_allowed(0.0, 0.0, 0.3) == 0.3
    assert bounds.true_positives_allowed(1.0, 0.0, 0.1) == pytest.approx(0.1 * math.e)
    assert bounds.true_positives_allowed(1.0, 0.0, 0.9) == pytest.approx(1 - 0.1 / math.e)
    assert bounds.true_positives_allowed(1e6, 0.0, 0.01) == 1.0


# ---- the mechanism


def recipe(folder: Path, **method: Any) -> Config:
    return tiny_runs.config(
        folder,
        method=method,
        privacy={"num_units": 1000, "epsilon": 5.0, "delta": DELTA},
        run={"expected_batch_size": 100, "steps": 80, "spare_steps": 0},
    )


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Coins, batches and noise that are the same in each run of the tests."""
    monkeypatch.setattr(mechanism.secrets, "randbits", lambda bits: 12)
    monkeypatch.setattr(mechanism.secrets, "token_bytes", lambda size: bytes(range(size)))
    monkeypatch.setattr(sessions, "SecureNoise", lambda: DebugNoise(3))
    return monkeypatch


@pytest.mark.parametrize("epsilon", [4.0, 8.0])
def test_a_pure_promise_is_reached_in_one_step_of_all(tmp_path: Path, fixed: Any, epsilon: float):
    """The Laplace mechanism's worst case: then a bound that assumes nothing of the noise comes near, too."""
    method = {"gradient": "zeroth_order", "zeroth_preset": "dpzo", "zeroth_noise": "laplace"}
    run = {"expected_batch_size": 60, "steps": 1, "spare_steps": 0}
    config = tiny_runs.config(tmp_path, method=method, privacy={"epsilon": epsilon}, run=run)
    report = mechanism.audit_mechanism(config, canaries=5000)
    found = {bound.method: bound.epsilon / report.claimed for bound in report.bounds}
    assert report.delta == 0
    assert 0.8 <= found["sampled_laplace"] < 1
    assert 0.5 <= found["clopper_pearson"] < 1
    less = mechanism_module.floored_laplace
    fixed.setattr(mechanism_module, "floored_laplace", lambda scale, below: less(scale * 7 // 10, below))
    assert mechanism.audit_mechanism(config, canaries=5000).bug


METHODS: list[dict[str, Any]] = [
    {},
    {"clip_norm": 0.01},
    {"clipping": "automatic"},
    {"clipping": "adaptive"},
    {"gradient": "ghost"},
    {"gradient": "layerwise"},
]
RARE = ({"clip_norm": 0.01}, {"gradient": "ghost"})
"""Audited among the slow tests alone: they share their noise with the others."""


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, id="-".join(map(str, m.values())) or "flat", marks=[pytest.mark.slow] if m in RARE else [])
        for m in METHODS
    ],
)
def test_a_sound_run_comes_near_its_epsilon_and_not_past_it(tmp_path: Path, fixed: Any, method: dict[str, Any]):
    report = mechanism.audit_mechanism(recipe(tmp_path, **method), canaries=3000)
    assert not report.bug
    assert 4.9 < report.claimed <= 5.0
    found = {bound.method: bound.epsilon / report.claimed for bound in report.bounds}
    assert 0.7 <= found["sampled_gaussian"] < 1
    assert 0.5 <= found["gaussian"] < 1
    assert 0.1 <= found["one_run"] < 1


def halved(m: pytest.MonkeyPatch) -> None:
    right = DebugNoise.normal
    m.setattr(DebugNoise, "normal", lambda self, shape, std, **where: right(self, shape, std / 2, **where))


def left_out_every_second_time(m: pytest.MonkeyPatch) -> None:
    right = DebugNoise.normal

    def normal(self: DebugNoise, shape: Any, std: float, *, step: int, **where: Any) -> torch.Tensor:
        return right(self, shape, std * (step % 2), step=step, **where)

    m.setattr(DebugNoise, "normal", normal)


def not_clipped(m: pytest.MonkeyPatch) -> None:
    m.setattr(Flat, "coefficients", lambda self, norms: torch.full_like(norms, 4 / mechanism.STEEPNESS))


def divided_twice(m: pytest.MonkeyPatch) -> None:
    right = GaussianMechanism.privatize

    def privatize(self: GaussianMechanism, total: Any, step: int) -> Any:
        right_scale, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier / self.divisor
        try:
            return right(self, total, step)
        finally:
            self.noise_multiplier = right_scale

    m.setattr(GaussianMechanism, "privatize", privatize)


def drawn_too_often(m: pytest.MonkeyPatch) -> None:
    right = mechanism.PoissonSampler
    m.setattr(mechanism, "PoissonSampler", lambda count, prob, key: right(count, min(1.0, 8 * prob), key))


@pytest.mark.parametrize(
    "fault", [halved, left_out_every_second_time, not_clipped, divided_twice, drawn_too_often], ids=lambda f: f.__name__
)
def test_a_broken_run_is_found_out(tmp_path: Path, fixed: pytest.MonkeyPatch, fault: Any):
    fault(fixed)
    many = 5000 if fault is left_out_every_second_time else 1000
    report = mechanism.audit_mechanism(recipe(tmp_path), canaries=many)
    assert report.bug
    assert "BUG" in report.render()


def test_nothing_to_audit(tmp_path: Path):
    for section in ({"privacy": {"epsilon": "none"}}, {"run": {"debug_noise_seed": 1}}):
        with pytest.raises(SottoError, match="SOT703"):
            sotto.audit(tiny_runs.config(tmp_path, **section))


# ---- a run


def no_noise(m: pytest.MonkeyPatch) -> None:
    m.setattr(
        GaussianMechanism,
        "privatize",
        lambda self, total, step: {name: value / self.divisor for name, value in total.gradients.items()},
    )


def trained(folder: Path, kind: str, **changes: Any) -> Any:
    write = tiny_runs.write_csv if kind == "classification" else tiny_runs.write_jsonl
    held_out = write(folder / f"held_out_{kind}.txt".replace("txt", "csv" if kind == "classification" else "jsonl"),
                     tiny_runs.rows(50, seed=9))  # fmt: skip
    changes.setdefault("data", {})["eval"] = str(held_out)
    return sotto.train(tiny_runs.config(folder, kind, **changes))


@pytest.mark.parametrize("kind", ["classification", "completion", "plain_text"])
def test_members_of_a_private_run_are_not_told_apart(tmp_path: Path, kind: str):
    report = sotto.audit(trained(tmp_path, kind).path)
    assert not report.bug
    assert report.numbers["members"] == tiny_runs.UNITS
    assert 0.3 < report.numbers["area_under_curve"] < 0.7
    assert any("private data" in note for note in report.notes)


def test_members_of_a_run_that_learnt_them_by_heart_are(tmp_path: Path, seeded: pytest.MonkeyPatch):
    """The negative twin: a run whose noise was left out, and which says epsilon 8 all the same."""
    no_noise(seeded)
    tiny_runs.write_jsonl(tmp_path / "letters.jsonl", tiny_runs.rows(12))
    strong: dict[str, Any] = {"steps": 70, "learning_rate": 0.02, "expected_batch_size": 12, "microbatch_size": 64}
    done = trained(
        tmp_path, "completion", run=strong, method={"clip_norm": 100.0}, privacy={"num_units": 12, "delta": 1e-2}
    )
    assert sotto.audit(done.path).numbers["area_under_curve"] > 0.8


def test_a_run_without_held_out_data_or_without_a_promise(tmp_path: Path):
    with pytest.raises(SottoError, match="SOT704"):
        sotto.audit(sotto.train(tiny_runs.config(tmp_path)).path)
    plain = trained(tmp_path, "classification", privacy={"epsilon": "none"})
    with pytest.raises(SottoError, match="SOT703"):
        sotto.audit(plain.path)


# ---- planted canaries


WAYS: list[dict[str, Any]] = [
    {},
    {"gradient": "layerwise"},
    {"train": "side", "side_reduction": 2},
    {"train": "reversible"},
]


@pytest.mark.parametrize("method", WAYS, ids=lambda m: "-".join(map(str, m.values())) or "full")
@pytest.mark.parametrize("kind", tiny_runs.KINDS)
def test_planted_canaries_are_not_found_in_a_private_run(tmp_path: Path, kind: str, method: dict[str, Any]):
    report = sotto.audit(tiny_runs.config(tmp_path, kind, method=method), plant=40)
    assert not report.bug
    assert report.numbers["planted"] + report.numbers["left_out"] == 40
    assert 5 <= report.numbers["planted"] <= 35
    (run,) = sotto.ls(tmp_path / "runs")
    assert run["state"] == "finished"
    assert "_audit_" in run["run"]


def learnt_by_heart(folder: Path, kind: str, write: Any, file: str, m: pytest.MonkeyPatch, canaries: int) -> Any:
    """An audit of a run without noise, on few units, that promises epsilon 0.3."""
    no_noise(m)
    write(folder / file, tiny_runs.rows(12))
    run: dict[str, Any] = {"steps": 100, "learning_rate": 0.02, "expected_batch_size": 12, "microbatch_size": 200}
    privacy = {"epsilon": 0.3, "num_units": 12, "delta": 1e-2}
    config = tiny_runs.config(folder, kind, run=run, method={"clip_norm": 10.0}, privacy=privacy)
    return sotto.audit(config, plant=canaries)


def test_they_are_found_in_a_classifier_without_noise(tmp_path: Path, seeded: pytest.MonkeyPatch):
    report = learnt_by_heart(tmp_path, "classification", tiny_runs.write_csv, "notes.csv", seeded, 120)
    assert report.numbers["area_under_curve"] > 0.75
    assert report.lower > report.claimed


@pytest.mark.slow
def test_they_are_found_in_a_language_model_without_noise(tmp_path: Path, seeded: pytest.MonkeyPatch):
    report = learnt_by_heart(tmp_path, "completion", tiny_runs.write_jsonl, "letters.jsonl", seeded, 24)
    assert report.numbers["area_under_curve"] > 0.9
    assert "planted_and_completed" not in report.numbers, "that is asked of secrets alone"


def test_planting_leaves_the_dataset_as_it_is(tmp_path: Path):
    """Every unit of the dataset has the examples that it had; canaries are units of one example after them."""
    for kind in tiny_runs.KINDS:
        config = tiny_runs.config(tmp_path, kind)
        parts = sessions.load_parts(config, "")
        data, generator = parts.data, np.random.default_rng(1)
        planted = canary_units.make(config, data, parts.tokenizer, 9, generator)
        chosen = np.array([1, 4, 8])
        whole = canary_units.among(data, planted, chosen)
        assert len(whole.units) == len(data.units) + 3
        assert whole.fingerprint == data.fingerprint, "it is charged to the same ledger"
        pad = parts.tokenizer.pad_token_id
        for unit in range(len(whole.units)):
            of, index = (data, unit) if unit < len(data.units) else (planted, chosen[unit - len(data.units)])
            examples, _ = whole.units.members_of(np.array([unit]))
            expected, _ = of.units.members_of(np.array([index]))
            first, second = whole.examples.collate(examples, pad), of.examples.collate(expected, pad)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)
        parts.engine.detach()


def test_an_audit_that_is_stopped_cannot_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = planting.commands.run_session

    def stopped(session: Any, progress: Any) -> Any:
        session.stop_requested = True
        return right(session, progress)

    monkeypatch.setattr(planting.commands, "run_session", stopped)
    with pytest.raises(SottoError, match="SOT705"):
        sotto.audit(tiny_runs.config(tmp_path), plant=24)
    (run,) = sotto.ls(tmp_path / "runs")
    with pytest.raises(SottoError, match="SOT507"):
        sotto.resume(run["run"])


# ---- the command


def test_the_command_exits_with_2_when_a_promise_is_refuted(
    tmp_path: Path, fixed: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    values = tiny_runs.write_yaml(
        tmp_path,
        privacy={"num_units": 1000, "epsilon": 5.0, "delta": DELTA},
        run={"expected_batch_size": 100, "steps": 40, "spare_steps": 0},
    )
    for broken in (False, True):
        if broken:
            divided_twice(fixed)
        fixed.setattr("sys.argv", ["sotto", "audit", str(values), "--canaries", "600", "--json"])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        report = json.loads(capsys.readouterr().out)
        assert report["bug"] is broken
        assert code == (2 if broken else 0)

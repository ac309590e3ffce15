# ruff: noqa
# pyright: basic
"""Plants faults that are in no catalogue, and asks whole test files which of them they notice. FOR A HUNT, not for CI."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from mutant import QUIET, TESTS, wrapped  # noqa: E402

from sotto import checkpoint, commands, distributed, finish, noisy_scores, rundir, sweeping, training  # noqa: E402
from sotto import metrics as metrics_  # noqa: E402
from sotto import session as sessions  # noqa: E402
from sotto.data import load, sampling, units  # noqa: E402
from sotto.data.sampling import PoissonSampler  # noqa: E402
from sotto.gradients import clipping  # noqa: E402
from sotto.gradients.clipping import Adaptive, Flat  # noqa: E402
from sotto.models import activation_cache  # noqa: E402
from sotto.privacy import accounting, chain, discrete, events, ledger, mechanism, noise, rounded, selection  # noqa: E402
from sotto.privacy import plan as plans  # noqa: E402
from sotto.privacy.ledger import Ledger  # noqa: E402

CANDIDATES: list[tuple[Any, tuple[str, ...]]] = []


def hunt(*tests: str) -> Any:
    def enter(plant: Any) -> Any:
        CANDIDATES.append((plant, tests))
        return plant

    return enter


LEDGER, TRAIN, REPLAY = "test_privacy_ledger.py", "test_training.py", "test_replay.py"


# ---- the ledger and its budget
def in_ledger(m: Any, **changed: Any) -> None:
    m.setattr(ledger, "accounting", SimpleNamespace(**{**vars(accounting), **changed}))


@hunt(LEDGER)
def budget_at_a_larger_delta(m):
    right = accounting.composed_epsilon
    in_ledger(m, composed_epsilon=lambda ev, delta, *r, **k: right(ev, min(0.5, 10 * delta), *r, **k))


@hunt(LEDGER)
def budget_in_the_other_relation(m):
    right = accounting.composed_epsilon
    in_ledger(m, composed_epsilon=lambda ev, delta, rel="", **k: right(ev, delta, "add_or_remove_one", **k))


@hunt(LEDGER)
def closed_runs_are_forgotten(m):
    def ev(self):
        return [(r.event, r.reserved) for r in self._runs.values() if r.reserved and not r.closed]

    m.setattr(Ledger, "events", ev)


@hunt(LEDGER)
def budget_may_be_passed_by_a_twentieth(m):
    right = accounting.composed_epsilon
    in_ledger(m, composed_epsilon=lambda *a, **k: right(*a, **k) / 1.05)


@hunt(LEDGER, "test_rundir.py")
def ledger_can_be_read_by_all(m):
    right = chain.os.open
    fake = SimpleNamespace(**vars(chain.os))
    fake.open = lambda p, f, mode=0o777: right(p, f, 0o644)
    m.setattr(chain, "os", fake)


@hunt(LEDGER, "test_data_load.py")
def units_share_no_ledger_with_the_dataset_name(m):
    wrapped(m, sessions, "ledger_id", lambda right, config, content: right(config, content + config.output.dir))


@hunt("test_noisy_scores.py")
def scores_are_charged_to_another_ledger(m):
    m.setattr(noisy_scores, "ledger_id", lambda config, content: "scores")


# ---- sampling
@hunt("test_data_sampling.py")
def draws_with_repetition(m):
    def draw(self, step, attempt=0):
        g = self._stream(step, attempt)
        c = int(g.binomial(self.num_units, self.sampling_prob))
        return np.sort(g.choice(self.num_units, c, replace=True)).astype(np.int64)

    m.setattr(PoissonSampler, "draw", draw)


@hunt("test_data_sampling.py")
def the_last_unit_is_never_drawn(m):
    def draw(self, step, attempt=0):
        g = self._stream(step, attempt)
        c = int(g.binomial(self.num_units, self.sampling_prob))
        n = max(1, self.num_units - 1)
        return np.sort(g.choice(n, min(c, n), replace=False)).astype(np.int64)

    m.setattr(PoissonSampler, "draw", draw)


@hunt("test_data_sampling.py")
def sampling_two_percent_too_often(m):
    def draw(self, step, attempt=0):
        g = self._stream(step, attempt)
        c = int(g.binomial(self.num_units, min(1.0, 1.02 * self.sampling_prob)))
        return np.sort(g.choice(self.num_units, c, replace=False)).astype(np.int64)

    m.setattr(PoissonSampler, "draw", draw)


@hunt("test_data_sampling.py")
def neighbours_are_drawn_together(m):
    def draw(self, step, attempt=0):
        g = self._stream(step, attempt)
        half = g.random((self.num_units + 1) // 2) < self.sampling_prob
        return np.flatnonzero(np.repeat(half, 2)[: self.num_units]).astype(np.int64)

    m.setattr(PoissonSampler, "draw", draw)


@hunt("test_data_sampling.py")
def a_draw_is_never_empty(m):
    wrapped(
        m,
        PoissonSampler,
        "draw",
        lambda right, self, step, attempt=0: (
            d if len(d := right(self, step, attempt)) else np.zeros(min(1, self.num_units), dtype=np.int64)
        ),
    )


# ---- noise of every mechanism, 30 % less
@hunt("test_privacy_rounded.py")
def rounded_noise_too_small(m):
    wrapped(m, rounded, "rounded_normal", lambda right, c, std, *a: right(c, 0.7 * std, *a))
    wrapped(m, noise, "rounded_normal", lambda right, c, std, *a: right(c, 0.7 * std, *a))


@hunt("test_privacy_rounded.py", "test_privacy_mechanism.py")
def exact_std_too_small(m):
    wrapped(m, mechanism, "exact_std", lambda right, *a: 0.7 * right(*a))


@hunt("test_privacy_rounded.py", "test_privacy_mechanism.py")
def secure_rounded_a_tenth_too_small(m):
    wrapped(m, noise.SecureNoise, "rounded", lambda right, self, shape, std, **k: right(self, shape, 0.9 * std, **k))


@hunt("test_privacy_mechanism.py", "test_zeroth_release.py")
def laplace_scale_too_small(m):
    wrapped(m, mechanism, "floored_laplace", lambda right, scale, below: right(max(1, scale * 7 // 10), below))


@hunt("test_privacy_discrete.py")
def discrete_geometric_too_short(m):
    wrapped(m, discrete, "geometric", lambda right, scale, *b: right(max(1, scale * 7 // 10), *b))


@hunt("test_noisy_scores.py")
def scores_noise_too_small(m):
    wrapped(m, noisy_scores, "add_rounded_gaussian", lambda right, c, std, *b: right(c, 0.7 * std, *b))


@hunt("test_noisy_scores.py")
def scores_sensitivity_of_one(m):
    m.setattr(noisy_scores, "SENSITIVITY", noisy_scores.GRID)


@hunt("test_noisy_scores.py")
def scores_are_free(m):
    m.setattr(noisy_scores.Ledger, "reserve", lambda self, *a: None)


@hunt("test_noisy_scores.py")
def scores_count_examples_as_units(m):
    def unit_scores(right, model, tok, config, loaded, batch):
        found = right(model, tok, config, loaded, batch)
        return [s for s, n in zip(found, loaded.units.sizes) for _ in range(int(n))]

    wrapped(m, noisy_scores, "unit_scores", unit_scores)


@hunt("test_noisy_scores.py")
def scores_are_calibrated_for_removal(m):
    right = accounting.noise_multiplier
    m.setattr(
        noisy_scores,
        "accounting",
        SimpleNamespace(
            **{**vars(accounting), "noise_multiplier": lambda e, q, n, d, rel: right(e, q, n, d, "add_or_remove_one")}
        ),
    )


# ---- less noise for some configurations alone
def less(m: Any, where: Any) -> None:
    def make(right, config, plan, *rest):
        made = right(config, plan, *rest)
        if where(config) and hasattr(made, "noise_multiplier"):
            made.noise_multiplier *= 0.7
            if hasattr(made, "_sum"):
                made._sum.noise_multiplier *= 0.7
        return made

    wrapped(m, sessions, "make_mechanism", make)


@hunt("test_wiring.py", TRAIN, REPLAY, "test_train_zeroth.py", "test_zeroth_tangents.py", "test_federated_spry.py")
def forward_gradients_have_less_noise(m):
    less(m, lambda c: c.method.zeroth_order and c.method.zeroth_smoothing == 0)


@hunt("test_wiring.py", "test_train_zeroth.py", REPLAY)
def zeroth_has_less_noise(m):
    less(m, lambda c: c.method.zeroth_order and not c.method.laplace)


@hunt("test_wiring.py", "test_train_zeroth.py", REPLAY)
def laplace_has_less_noise(m):
    less(m, lambda c: c.method.laplace)


@hunt("test_wiring.py", "test_train_side.py", REPLAY)
def side_has_less_noise(m):
    less(m, lambda c: c.method.train == "side")


@hunt("test_wiring.py", "test_train_side.py", REPLAY)
def reversible_has_less_noise(m):
    less(m, lambda c: c.method.train == "reversible")


@hunt("test_wiring.py", "test_models_frozen.py", REPLAY)
def quantised_has_less_noise(m):
    less(m, lambda c: c.method.frozen_weights != "float32")


@hunt("test_wiring.py", "test_federated_run.py", REPLAY)
def federated_has_less_noise(m):
    less(m, lambda c: c.setting.kind == "federated")


@hunt(
    "test_distributed.py",
)
def several_processes_have_less_noise(m):
    wrapped(
        m,
        distributed.Followers,
        "greet",
        lambda right, self, s, *a: (
            right(self, s, *a),
            setattr(s.mechanism, "noise_multiplier", 0.7 * s.mechanism.noise_multiplier),
        )[0],
    )


@hunt("test_wiring.py", REPLAY, "test_privacy_rounded.py")
def exact_noise_has_less_noise(m):
    less(m, lambda c: c.privacy.exact_noise)


@hunt("test_wiring.py", REPLAY)
def bfloat16_has_less_noise(m):
    less(m, lambda c: c.model.dtype == "bfloat16")


@hunt("test_wiring.py", REPLAY, TRAIN, "test_resume.py::test_dropout_is_the_same_after_a_resume")
def a_resumed_run_has_less_noise(m):
    def resume(right, *a, **k):
        s = right(*a, **k)
        if hasattr(s.mechanism, "noise_multiplier"):
            s.mechanism.noise_multiplier *= 0.7
        return s

    wrapped(m, sessions, "resume", resume)


@hunt("test_wiring.py", REPLAY, "test_privacy_statement.py")
def replace_one_has_less_noise(m):
    less(m, lambda c: c.privacy.neighboring_relation == "replace_one")


@hunt("test_wiring.py", "test_train_zeroth.py", "test_zeroth_release.py", "test_zeroth_tangents.py")
def forward_gradients_are_not_clipped(m):
    from sotto.zeroth_order import engine as ze

    right = ze.ZerothOrder.clipped_sum

    def clipped_sum(self, batch, units, step, part=0):
        total = right(self, batch, units, step, part)
        if self.prober.smoothing == 0:
            for v in total.gradients.values():
                v.mul_(3)
        return total

    m.setattr(ze.ZerothOrder, "clipped_sum", clipped_sum)


@hunt("test_wiring.py", "test_train_side.py", REPLAY)
def side_is_not_clipped(m):
    def make(right, config):
        made = right(config)
        return Flat(3 * config.method.clip_norm) if config.method.train == "side" else made

    wrapped(m, sessions, "make_clipping", make)


# ---- what leaves a run
@hunt(REPLAY, "test_cli.py")
def losses_are_printed(m):
    def losses_of(right, s, ex):
        found = right(s, ex)
        print("loss", found.detach().tolist())
        return found

    wrapped(m, training, "losses_of", losses_of)


@hunt(REPLAY, "test_cli.py")
def losses_are_logged(m):
    import logging

    def losses_of(right, s, ex):
        found = right(s, ex)
        logging.getLogger("sotto").warning("loss %s", found.detach().tolist())
        return found

    wrapped(m, training, "losses_of", losses_of)


@hunt(REPLAY, "test_released_bytes.py", "test_cli.py")
def a_file_is_left_in_the_current_folder(m):
    def losses_of(right, s, ex):
        found = right(s, ex)
        Path("sotto-losses.txt").write_text(str(found.detach().tolist()))
        return found

    wrapped(m, training, "losses_of", losses_of)


@hunt(REPLAY, "test_released_bytes.py")
def a_file_is_left_in_the_temporary_folder(m):
    def losses_of(right, s, ex):
        found = right(s, ex)
        (Path(tempfile.gettempdir()) / "sotto-losses.txt").write_text(str(found.detach().tolist()))
        return found

    wrapped(m, training, "losses_of", losses_of)


@hunt(REPLAY)
def tensorboard_gets_private_numbers(m):
    def log(right, self, step, public, private):
        right(self, step, public, private)
        if self._board is not None:
            for n, v in private.items():
                if isinstance(v, (int, float)):
                    self._board.add_scalar(n, v, step)

    wrapped(m, metrics_.Metrics, "log", log)


@hunt("test_train_side.py", "test_models_cache.py")
def the_cache_stays(m):
    from sotto import activations

    m.setattr(activations, "delete", lambda run: None)


@hunt("test_train_side.py", "test_models_cache.py")
def the_hidden_file_of_the_cache_stays(m):
    def wipe(folder):
        for name in (activation_cache.ABOUT, activation_cache.ROWS):
            (folder / name).unlink(missing_ok=True)

    m.setattr(activation_cache, "wipe", wipe)


@hunt(REPLAY, "test_released_bytes.py")
def the_optimizer_keeps_the_sum(m):
    # momentum of the sums before the noise, in a checkpoint
    last = {}

    def privatize(right, self, total, step):
        last.update({f"raw/{n}": g.clone() for n, g in total.gradients.items()})
        return right(self, total, step)

    wrapped(m, mechanism.GaussianMechanism, "privatize", privatize)
    from dataclasses import replace

    wrapped(
        m,
        checkpoint,
        "save",
        lambda right, folder, state: right(folder, replace(state, optimizer={**state.optimizer, **last})),
    )


@hunt(REPLAY, "test_train_zeroth.py", "test_released_bytes.py")
def the_directions_key_is_the_sampling_key(m):
    import secrets as s

    kept = s.token_bytes(16)
    m.setattr(sessions, "new_key", lambda: kept.hex())
    fake = SimpleNamespace(**{**vars(s), "token_bytes": lambda n=16: kept[:n]})
    m.setattr(sessions, "secrets", fake)


@hunt(REPLAY, "test_released_bytes.py")
def the_seed_of_an_export_is_the_sampling_key(m):
    def write(right, trained, folder, *a):
        right(trained, folder, *a)
        (folder / "special.json").write_text(__import__("json").dumps({"n": 1}))

    wrapped(m, finish, "write_model", write)


# ---- seals
@hunt("test_damage.py", "test_rundir.py", "test_resume.py::test_a_configuration_that_was_edited_is_refused")
def an_edited_plan_is_believed(m):
    wrapped(
        m, rundir.RunDir, "verify", lambda right, self, *names: right(self, *[n for n in names if n != "plan.json"])
    )


@hunt("test_damage.py", "test_rundir.py")
def an_edited_secret_is_believed(m):
    wrapped(
        m,
        rundir.RunDir,
        "verify",
        lambda right, self, *names: right(self, *[n for n in names if not n.startswith("private/")]),
    )


@hunt("test_damage.py", "test_rundir.py", "test_report.py")
def an_edited_model_is_believed(m):
    m.setattr(rundir.RunDir, "verify_model", lambda self: None)


@hunt("test_damage.py", "test_resume.py")
def changed_data_is_believed(m):
    m.setattr(sessions, "digest", lambda data: "")


# ---- adaptive clipping
@hunt("test_gradients_layerwise.py", "test_gradients_clipping.py")
def the_threshold_is_not_clamped(m):
    def follow(self, fraction_G):
        ex = (-self.learning_rate * (fraction_G.double() - self.quantile)).tolist()
        self.thresholds = [c * np.exp(e) for c, e in zip(self.thresholds, ex)]

    m.setattr(Adaptive, "follow", follow)


@hunt("test_gradients_layerwise.py", "test_gradients_clipping.py", REPLAY)
def sensitivity_is_the_initial_norm(m):
    m.setattr(Adaptive, "sensitivity", property(lambda self: self.clip_norm))


# ---- processes
@hunt("test_distributed.py")
def followers_draw_their_own_units(m):
    wrapped(
        m,
        distributed.Group,
        "share",
        lambda right, self, u: np.sort(
            np.random.default_rng(self.rank).choice(60, len(u[self.rank :: self.size]), replace=False)
        ),
    )


@hunt("test_distributed.py")
def a_follower_has_other_data(m):
    m.setattr(sessions, "digest", lambda data: "")


# ---- units
@hunt("test_data_units.py", "test_data_load.py")
def one_example_more_than_the_bound(m):
    wrapped(m, units, "_bounded", lambda right, unit, ex, most, seed: right(unit, ex, most + 1, seed))


@hunt("test_data_load.py", "test_data_encode.py", "test_data_units.py")
def rows_without_a_unit_are_one_unit_each(m):
    wrapped(m, load, "clean_units", lambda right, values: [v or f"row {i}" for i, v in enumerate(right(values))])


@hunt("test_data_sampling.py")
def microbatches_lose_the_last_unit(m):
    wrapped(m, training, "microbatches", lambda right, *a: (lambda r: r[:-1] if len(r) > 1 else r)(right(*a)))


# ---- accounting
@hunt("test_privacy_accounting.py")
def coarse_grid_for_everything(m):
    from sotto.privacy import bounds

    wrapped(m, accounting, "upper_bound", lambda right, ev, d, rel, tol: right(ev, d, rel, 0.3))


@hunt("test_privacy_accounting.py", "test_train_zeroth.py")
def pure_epsilon_ignores_a_step(m):
    wrapped(m, accounting, "pure_epsilon", lambda right, ev: right([(e, max(1, n - 1)) for e, n in ev]))


@hunt("test_privacy_accounting.py", "test_train_zeroth.py")
def sampled_laplace_is_amplified_twice(m):
    import math

    m.setattr(
        events.PoissonLaplace,
        "pure_epsilon",
        property(lambda self: math.log1p(self.sampling_prob**2 * math.expm1(1 / self.noise_multiplier))),
    )


@hunt("test_privacy_accounting.py")
def gdp_mu_is_too_small(m):
    wrapped(m, accounting, "gdp_mu", lambda right, *a: 0.95 * right(*a))


@hunt("test_sweep.py")
def geometric_from_zero(m):
    wrapped(m, selection, "draw_trials", lambda right, *a: right(*a) - 1)


@hunt("test_sweep.py")
def mean_of_trials_is_doubled(m):
    wrapped(m, selection, "draw_trials", lambda right, mean, *a: right(2 * mean, *a))


@hunt("test_sweep.py")
def trials_follow_a_seeded_generator(m):
    import random

    m.setattr(selection.secrets, "SystemRandom", lambda: random.Random(0))


@hunt("test_sweep.py")
def the_sweep_releases_the_last_trial(m):
    scores = iter(range(10**6))
    wrapped(m, sweeping, "_one", lambda right, *a: (right(*a)[0], float(next(scores))))


@hunt("test_sweep.py")
def settings_are_taken_in_turn(m):
    turn = iter(range(10**6))

    class R:
        def choice(self, values):
            return values[next(turn) % len(values)]

        def random(self):
            import secrets

            return secrets.randbelow(2**53) / 2**53

    m.setattr(sweeping.secrets, "SystemRandom", R)


# ---- zeroth order and federated
@hunt("test_train_zeroth.py", "test_zeroth_directions.py")
def directions_repeat_every_second_step(m):
    from sotto.zeroth_order import directions

    wrapped(m, directions.Directions, "tensor", lambda right, self, name, step, *r: right(self, name, step // 2, *r))


@hunt("test_federated_run.py", "test_federated_core.py")
def a_round_is_charged_after_its_orders(m):
    def begin(right, s, step):
        units = s.sampler.draw(step, 0)
        if isinstance(s.engine, training.Cohort):
            s.engine.early = units
        return right(s, step)

    wrapped(m, training, "begin_step", begin)


@hunt("test_federated_run.py", "test_federated_core.py")
def sites_draw_with_one_key(m):
    from sotto.federated import site

    fake = SimpleNamespace(**{**vars(site.secrets), "token_bytes": lambda n: bytes(n)})
    m.setattr(site, "secrets", fake)


@hunt("test_federated_codecs.py", "test_federated_run.py", "test_federated_core.py", "test_federated_masks.py")
def shares_are_too_small(m):
    from sotto.federated import shares

    wrapped(m, shares.Shares, "of", lambda right, clip, z, *a, **k: right(clip, 0.7 * z, *a, **k))


class Plugin:
    def __init__(self, plant):
        self.plant, self.ran, self.failed, self.odd = plant, 0, [], []

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem=None):
        self.ran += 1
        with pytest.MonkeyPatch.context() as patch:
            self.plant(patch)
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        from mutant import noticed

        if call.excinfo is not None and report.outcome == "failed":
            if noticed(call.excinfo.value):
                item.session.shouldstop = "noticed"
            (self.failed if noticed(call.excinfo.value) else self.odd).append(
                f"{item.path.name}::{item.name} ({report.when}: {call.excinfo.typename} {str(call.excinfo.value)[:80]!r})"
            )
        return report


def main():
    wanted = sys.argv[1:]
    part, of = (int(x) for x in wanted[0].split("/")) if wanted and "/" in wanted[0] else (0, 1)
    names = set(wanted[1:] if wanted and "/" in wanted[0] else wanted)
    for i, (plant, tests) in enumerate(CANDIDATES):
        if i % of != part or (names and plant.__name__ not in names):
            continue
        plugin, began, out = Plugin(plant), time.monotonic(), io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            args = [str(TESTS / t) for t in tests]
            pytest.main(
                [
                    *args,
                    "-x",
                    "--rootdir",
                    str(TESTS.parent),
                    "--basetemp",
                    f"{folder}/tmp",
                    "-W",
                    "ignore::pytest.PytestAssertRewriteWarning",
                    *QUIET,
                ],
                plugins=[plugin],
            )
        verdict = (
            f"KILLED {plugin.failed[0]}" if plugin.failed else f"SURVIVED {plugin.ran} tests; odd: {plugin.odd[:2]}"
        )
        if not plugin.ran:
            verdict = "NO TESTS " + out.getvalue()[-300:]
        print(f"{plant.__name__}: {verdict} [{time.monotonic() - began:.0f} s]", flush=True)


main()

"""Whole federated runs in one process: the statement, the ledger, resuming, and agreement with central training."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs

import sotto
from sotto import cli, training
from sotto import session as sessions
from sotto.errors import SottoError
from sotto.federated.simulate import simulate
from sotto.privacy import accounting, statement
from sotto.privacy.adversaries import adversaries
from sotto.privacy.ledger import Ledger
from sotto.privacy.noise import SecureNoise
from sotto.privacy.plan import make_plan

FEDERATED: dict[str, Any] = {"kind": "federated", "local_batch_size": 2, "local_learning_rate": 0.05}


def config(folder: Path, setting: dict[str, Any] | None = None, **changes: dict[str, Any]) -> sotto.Config:
    return tiny_runs.config(folder, setting={**FEDERATED, **(setting or {})}, **changes)


def debug(folder: Path, **changes: Any) -> sotto.Config:
    changes["run"] = {"debug_noise_seed": 5, **changes.get("run", {})}
    return config(folder, **changes)


METHODS = {
    "full": {"method": {"train": "full"}},
    "lora up": {"method": {"train": "lora", "lora_train": "up"}},
    "side": {"method": {"train": "side", "side_reduction": 2}},
    "srht": {"setting": {"codec": "srht", "latent": 300}},
    "learned": {"setting": {"codec": "learned", "latent": 20}},
    "autoencoder": {"setting": {"codec": "autoencoder", "latent": 2000}},
    "adaptive": {"method": {"train": "full", "clipping": "adaptive"}},
    "yogi": {"run": {"optimizer": "yogi"}},
    "zeroth order": {"method": {"train": "head", "gradient": "zeroth_order", "zeroth_probes": 2}},
    "spry": {
        "method": {"train": "lora", "gradient": "zeroth_order", "zeroth_probes": 2, "zeroth_smoothing": 0},
        "setting": {"parts": 3},
    },
    "rows": {"setting": {"embedding_rows": 12}, "method": {"train": "lora"}},
}


@pytest.fixture(autouse=True)
def _hasty_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of its training is enough for one that has nothing to learn."""
    monkeypatch.setattr("sotto.federated.autoencoder.STEPS", 300)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_states_its_guarantee(name: str, tmp_path: Path):
    run = simulate(config(tmp_path, **METHODS[name]))
    plan = json.loads((run.path / "plan.json").read_text())
    facts = json.loads((run.path / "privacy.json").read_text())
    epsilon = accounting.epsilon(plan["noise_multiplier"], plan["sampling_prob"], run.steps, plan["delta"])
    assert facts["epsilon"] == pytest.approx(epsilon, rel=2e-3)
    assert epsilon - 1e-9 <= facts["epsilon"] <= plan["epsilon"]
    assert [a["epsilon"] for a in facts["adversaries"]] == [pytest.approx(facts["epsilon"], abs=2e-6), None, None]
    assert "NO GUARANTEE" in run.statement
    assert sotto.load(run.path / "model") is not None
    secret = json.loads((run.path / "private" / "secrets.json").read_text())
    entry = Ledger.open(secret["ledger"]).runs[run.path.name]
    assert entry.closed
    assert entry.reserved == run.steps == 4


def test_ffa_lora_trains_the_upper_factors_alone(tmp_path: Path):
    run = simulate(config(tmp_path, method={"train": "lora", "lora_train": "up"}))
    names = [n for n, p in run.model.named_parameters() if p.requires_grad]
    assert names
    assert not [name for name in names if "lora_A" in name]


@pytest.mark.parametrize(
    "name", ["full", "srht", "learned", "adaptive", "yogi", "zeroth order", "spry", "rows", "masks"]
)
def test_a_run_that_was_stopped_ends_at_the_same_weights(name: str, tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    changes: dict[str, Any] = {**METHODS, "masks": {"setting": MASKED}}[name]
    whole = simulate(debug(tmp_path / "a", **changes))

    def stop(done: int, values: dict[str, Any]) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    halted = simulate(debug(tmp_path / "b", **changes), progress=stop)
    assert not halted.finished
    resumed = sotto.resume(halted.path)
    assert resumed.finished
    tiny_runs.assert_same(tiny_runs.final_weights(whole.path), tiny_runs.final_weights(resumed.path))


def test_a_killed_round_is_charged_again_with_other_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    session = sessions.start(config(tmp_path, run={"spare_steps": 5}), "run")
    session.held.close()
    asked: list[tuple[int, int]] = []

    def draw(step: int, attempt: int = 0) -> np.ndarray:
        asked.append((step, attempt))
        raise KeyboardInterrupt

    session.sampler.draw = draw  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        sotto.commands.run_session(session, None)
    done = sotto.resume(session.run.path)
    assert done.finished
    assert asked == [(0, 0)]
    facts = json.loads((done.path / "privacy.json").read_text())
    assert (facts["steps"], facts["steps_charged"]) == (4, 5)


def test_one_local_step_of_everybody_is_a_step_on_the_mean_of_their_gradients(tmp_path: Path):
    """With no noise, no clipping and one local step, start minus end is the local rate times each user's gradient."""
    one = {"epsilon": "none", "max_examples_per_unit": 1}
    sgd = {"optimizer": "sgd", "steps": 1, "schedule": "constant", "expected_batch_size": 60}
    for name in ("federated", "central"):
        (tmp_path / name).mkdir()
    setting = {"local_learning_rate": 0.5}
    federated = simulate(
        config(tmp_path / "federated", setting=setting, privacy=one, run={**sgd, "learning_rate": 1.0})
    )
    central = sotto.train(tiny_runs.config(tmp_path / "central", privacy=one, run={**sgd, "learning_rate": 0.5}))
    tiny_runs.assert_same(
        tiny_runs.final_weights(central.path), tiny_runs.final_weights(federated.path), tolerance=1e-5
    )


def test_scalars_of_users_are_those_of_central_zeroth_order_training(tmp_path: Path):
    method = {"train": "head", "gradient": "zeroth_order", "zeroth_probes": 3}
    for name in ("federated", "central"):
        (tmp_path / name).mkdir()
    federated = simulate(debug(tmp_path / "federated", method=method))
    central = sotto.train(tiny_runs.config(tmp_path / "central", method=method, run={"debug_noise_seed": 5}))
    tiny_runs.assert_same(
        tiny_runs.final_weights(federated.path), tiny_runs.final_weights(central.path), tolerance=1e-4
    )


# ---- sites


SITES: dict[str, Any] = {"sites": 3}


@pytest.mark.parametrize("noise", ["server", "clients"])
@pytest.mark.parametrize("gradient", ["auto", "ghost", "layerwise"])
def test_sites_train_and_state_their_guarantee(noise: str, gradient: str, tmp_path: Path):
    method = {"train": "lora", "gradient": gradient}
    run = simulate(config(tmp_path, {**SITES, "noise": noise}, method=method))
    facts = json.loads((run.path / "privacy.json").read_text())
    outside, sums, alone = (a["epsilon"] for a in facts["adversaries"])
    assert outside == pytest.approx(facts["epsilon"], abs=2e-6)
    if noise == "server":
        assert (sums, alone) == (None, None)
    else:
        assert sums == outside  # nobody else knows which units a site drew
        assert alone > outside


def test_all_units_at_sites_give_the_step_of_central_training(tmp_path: Path):
    """Every unit drawn, no noise: the sum of the sites' sums is the sum over all units."""
    run = {"optimizer": "sgd", "steps": 2, "schedule": "constant", "expected_batch_size": 60, "learning_rate": 0.5}
    for name in ("sites", "central"):
        (tmp_path / name).mkdir()
    sites = simulate(config(tmp_path / "sites", SITES, privacy={"epsilon": "none"}, run=run))
    central = sotto.train(tiny_runs.config(tmp_path / "central", privacy={"epsilon": "none"}, run=run))
    tiny_runs.assert_same(tiny_runs.final_weights(central.path), tiny_runs.final_weights(sites.path), tolerance=1e-5)


def test_the_sum_of_the_sites_moves_by_one_clipped_gradient_when_a_unit_is_left_out(tmp_path: Path):
    parts = sessions.load_parts(config(tmp_path, SITES, run={"expected_batch_size": 60}), "key")
    engine: Any = parts.engine
    whole = engine.collect(np.arange(3), 0).gradients["latent"]
    site = engine.carrier.__closure__[0].cell_contents._sites[1]
    units = site.data.units
    keep = np.arange(len(units))[1:]
    members, _ = units.members_of(keep)
    offsets = np.concatenate([[0], np.cumsum(units.sizes[keep])]).astype(np.int64)
    object.__setattr__(site, "data", type(site.data)(site.data.examples, type(units)(offsets, members), None, ""))
    moved = whole - engine.collect(np.arange(3), 0).gradients["latent"]
    assert 0 < float(moved.norm()) <= parts.engine.clipping.sensitivity * (1 + 1e-5)


def test_a_site_that_lies_is_bounded_by_all_that_it_could_hold(tmp_path: Path):
    engine: Any = sessions.load_parts(config(tmp_path, SITES), "key").engine
    vector = np.full(engine.codec.size, 1e30, dtype=np.float32)
    total = engine.add_up(np.arange(3), [(0, vector)]).gradients["latent"]
    assert float(total.norm()) <= 60 * 1.0 * (1 + 1e-6)


def test_every_draw_of_a_site_has_a_fresh_key(tmp_path: Path):
    """Also when a round is asked for twice: else the same units would be under two releases, or known in advance."""
    engine: Any = sessions.load_parts(config(tmp_path, SITES), "key").engine
    sites = engine.carrier.__closure__[0].cell_contents._sites
    samplers = [site._sampler(step, number) for number, site in enumerate(sites) for step in (0, 0, 1)]
    assert len({sampler._key for sampler in samplers}) == len(samplers) == 9
    assert all((s.num_units, s.sampling_prob, s.debug) == (20, 0.2, False) for s in samplers)
    debug: Any = sessions.load_parts(config(tmp_path, SITES, run={"debug_noise_seed": 1}), "key").engine
    sites = debug.carrier.__closure__[0].cell_contents._sites
    repeated = [site._sampler(0, number) for number, site in enumerate(sites) for _ in "12"]
    assert len({sampler._key for sampler in repeated}) == 3, "from the seed, and marked"
    assert all(sampler.debug for sampler in repeated)


def test_a_site_checks_its_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checked: list[int] = []
    right = training.check_gradients_of

    def check(holder: Any, units: np.ndarray) -> None:
        checked.append(len(units))
        right(holder, units)

    monkeypatch.setattr("sotto.training.check_gradients_of", check)
    simulate(config(tmp_path, SITES))
    assert checked == [3, 3, 3]  # once at each site


# ---- attacked


AUDITED: dict[str, Any] = {
    "server noise": {},
    "users' noise": {"noise": "clients", "dropouts": 0.0},
    "sites": {"sites": 3},
    "sites' noise": {"sites": 3, "noise": "clients", "dropouts": 0.0},
}


@pytest.mark.parametrize("name", AUDITED)
def test_an_audit_through_devices_and_server_stays_below_what_is_promised(name: str, seeded: Any, tmp_path: Path):
    report = sotto.audit(config(tmp_path, AUDITED[name], run={"steps": 8, "expected_batch_size": 30}), canaries=600)
    assert not report.bug
    # All canaries are users, more of them than the plan expects: with shares of their own they bring more noise.
    least = 0.1 if name == "users' noise" else 0.3
    assert max(bound.epsilon for bound in report.bounds) > least * report.claimed


@pytest.mark.parametrize("name", ["server noise", "users' noise", "sites' noise"])
def test_negative_twin_an_audit_finds_noise_that_is_too_small(name: str, tmp_path: Path, monkeypatch: Any):
    right = SecureNoise.normal
    monkeypatch.setattr(SecureNoise, "normal", lambda self, shape, std, **at: right(self, shape, std / 4, **at))
    assert sotto.audit(config(tmp_path, AUDITED[name], run={"steps": 8, "expected_batch_size": 30}), canaries=600).bug


# ---- what is written


def test_nothing_private_is_in_public_files(tmp_path: Path):
    run = simulate(config(tmp_path))
    public = (run.path / "metrics.public.jsonl").read_text()
    for word in ("units", "norm", "answer", "loss"):
        assert f'"{word}' not in public.replace("clip_norm", "").replace("update_norm", "")
    for path in run.path.rglob("*"):
        if path.is_file() and "private" not in path.parts and path.name != "metrics.private.jsonl":
            assert tiny_runs.CANARY.encode() not in path.read_bytes(), path


def test_with_noise_of_the_users_the_server_has_a_number_too(tmp_path: Path):
    plan = sotto.plan(config(tmp_path, setting={"noise": "clients"}))
    from sotto.privacy.adversaries import adversaries, least_answers, share_multiplier

    outside, sums, alone = adversaries(plan, 1.0, plan.total_steps)
    share = share_multiplier(plan.noise_multiplier, 12, 0.2)
    assert least_answers(12, 0.2) * share**2 == pytest.approx(plan.noise_multiplier**2)
    assert outside.epsilon == 1.0
    assert sums.epsilon is not None
    assert alone.epsilon is not None
    assert 1.0 < sums.epsilon < alone.epsilon


MASKED: dict[str, Any] = {"noise": "clients", "dropouts": 0.5, "masks": True}


@pytest.mark.parametrize(
    "setting", [{}, {"codec": "srht", "latent": 300}, {"sites": 4}], ids=["users", "srht", "sites"]
)
def test_a_run_with_masks_ends_at_the_weights_of_one_without(setting: dict[str, Any], tmp_path: Path):
    runs = []
    for masks in (True, False):
        (tmp_path / str(masks)).mkdir()
        runs.append(simulate(debug(tmp_path / str(masks), setting={**MASKED, **setting, "masks": masks})))
    tiny_runs.assert_same(*(tiny_runs.final_weights(run.path) for run in runs))
    masked, plain = (
        [json.loads(line)["answers"] for line in (run.path / "metrics.private.jsonl").read_text().splitlines()]
        for run in runs
    )
    assert [round["answered"] for round in masked] == [round["answered"] for round in plain]
    assert all(round["answered"] for round in masked)
    assert all(m["moved"]["messages up"] == p["moved"]["messages up"] for m, p in zip(masked, plain, strict=True))


@pytest.mark.parametrize("sites", [None, 6])
def test_with_masks_the_statement_counts_whose_noise_is_known_to_whom(sites: int | None, tmp_path: Path):
    """Six shares at least are in every sum; whoever has added some of them subtracts those."""
    from sotto.privacy.accounting import Gaussian, PoissonGaussian, composed_epsilon
    from sotto.privacy.adversaries import adversaries

    setting = {**MASKED, "sites": sites, "dropouts": 0.0 if sites else 0.5}
    plan = sotto.plan(config(tmp_path, setting=setting))
    share = plan.noise_multiplier / 6**0.5

    def left(shares: int) -> float:
        """Epsilon of the sum of so many shares."""
        noise = share * shares**0.5
        event = PoissonGaussian(noise, plan.sampling_prob) if sites else Gaussian(noise)
        return composed_epsilon([(event, 4)], plan.delta, plan.neighboring_relation)

    found = adversaries(plan, 1.0, 4)
    assert [a.epsilon for a in found] == [1.0, *(pytest.approx(left(n), rel=1e-6) for n in (5, 6, 3, 1))]
    assert "any one other" in found[1].who
    assert "3 of the" in found[3].who
    unmasked = adversaries(sotto.plan(config(tmp_path, setting={**setting, "masks": False})), 1.0, 4)
    assert unmasked[2].epsilon == pytest.approx(left(1), rel=1e-6)


def test_masks_without_their_libraries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    right = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "Crypto" else right(name, *a))
    with pytest.raises(SottoError, match="SOT949"):
        simulate(config(tmp_path, setting=MASKED))
    assert not list((tmp_path / "runs").glob("*/plan.json"))


def test_a_plan_says_how_many_masked_rounds_are_lost(tmp_path: Path):
    """The chance that fewer than nine of 60 users are drawn, each with probability 1/5."""
    import math

    from sotto.privacy.adversaries import lost_rounds
    from sotto.reporting import plan_text

    few = sum(math.comb(60, m) * 0.2**m * 0.8 ** (60 - m) for m in range(9))
    plan = sotto.plan(config(tmp_path, setting={**MASKED, "dropouts": 0.25}))
    assert lost_rounds(plan) == pytest.approx(few, rel=1e-9)
    assert f"lost rounds      {few:.2g} of all" in plan_text.render(plan)
    for setting in ({"noise": "clients"}, {**MASKED, "sites": 4}):
        other = sotto.plan(config(tmp_path, setting=setting))
        assert lost_rounds(other) == 0
        assert "lost rounds" not in plan_text.render(other)


REFUSED = [
    ({"masks": True}, {}, "noise: clients"),
    ({**MASKED, "dropouts": 0.9}, {}, "two users"),
    ({**MASKED, "sites": 3, "dropouts": 0.4}, {}, "two users"),
    ({"codec": "srht"}, {}, "latent"),
    ({"latent": 5}, {}, "latent"),
    ({"codec": "subspace", "latent": 5}, {}, "public_data"),
    ({}, {"method": {"clipping": "automatic"}}, "clipping"),
    ({}, {"method": {"gradient": "ghost"}}, "gradient"),
    ({"codec": "srht", "latent": 5}, {"method": {"gradient": "zeroth_order"}}, "codec"),
    ({"noise": "clients"}, {"method": {"clipping": "adaptive"}}, "flat"),
    ({"sites": 3}, {"method": {"clipping": "adaptive"}}, "clipping"),
    ({"sites": 3, "codec": "srht", "latent": 5}, {}, "codec"),
]


@pytest.mark.parametrize(("setting", "changes", "word"), REFUSED)
def test_combinations_without_a_meaning_are_refused(setting, changes, word: str, tmp_path: Path):
    with pytest.raises(SottoError, match=word):
        config(tmp_path, setting=setting, **changes)


def test_settings_and_commands_belong_together(tmp_path: Path):
    with pytest.raises(SottoError, match="SOT110"):
        sotto.train(config(tmp_path))
    with pytest.raises(SottoError, match="SOT931"):
        simulate(tiny_runs.config(tmp_path))


def test_the_codec_may_not_change_when_a_run_goes_on(tmp_path: Path):
    def stop(done: int, values: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)

    run = simulate(config(tmp_path), progress=stop)
    path = run.path / "config.yaml"
    path.write_text(path.read_text().replace("local_batch_size: 2", "local_batch_size: 3"))
    with pytest.raises(SottoError, match="SOT514"):
        sotto.resume(run.path)


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"noise": "server"}, "no guarantee"),
        ({"noise": "clients"}, "a server of sums epsilon"),
        ({"noise": "clients", "masks": True}, "and half of them epsilon"),
    ],
)
def test_a_plan_says_against_whom_before_anything_is_read(setting: dict[str, Any], word: str, tmp_path: Path):
    from sotto.reporting import plan_text

    assert word in plan_text.render(sotto.plan(config(tmp_path, setting)))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    path = tiny_runs.write_yaml(tmp_path, setting=FEDERATED)
    monkeypatch.setattr("sys.argv", ["sotto", "federated", "simulate", str(path), "--set", "run.steps=2"])
    cli.main()
    assert "AGAINST WHOM" in capsys.readouterr().out


def test_a_run_says_how_little_an_autoencoder_keeps(tmp_path: Path):
    (note,) = simulate(config(tmp_path, **METHODS["autoencoder"])).notes
    kept, projected = (float(word.rstrip("%;")) for word in note.split() if word.rstrip("%;") != word.rstrip(";"))
    assert 0 < kept < 1.1 * projected


@pytest.mark.parametrize("noise", [{"noise": "clients"}, {**MASKED}])
def test_numbers_of_all_adversaries_are_of_the_relation_of_the_run(noise: dict[str, Any], tmp_path: Path):
    """One user replaced by another moves a sum by twice the bound: as if there were half of the noise."""
    replaced = make_plan(config(tmp_path, noise, privacy={"neighboring_relation": "replace_one"}))
    half = dataclasses.replace(
        replaced, noise_multiplier=replaced.noise_multiplier / 2, neighboring_relation="add_or_remove_one"
    )
    numbers = [[a.epsilon for a in adversaries(plan, 1.0, 4)[1:]] for plan in (replaced, half)]
    assert numbers[0] == pytest.approx(numbers[1], rel=2e-3)


def test_rounds_that_were_done_again_count_against_every_adversary(tmp_path: Path):
    plan = make_plan(config(tmp_path, setting={"noise": "clients"}))
    stated = statement.earned(plan, 4, 5, 0.0, 1)
    assert [a.epsilon for a in stated.adversaries] == [a.epsilon for a in adversaries(plan, stated.epsilon, 5)]
    taken = [a.epsilon or 0.0 for a in adversaries(plan, plan.epsilon_after(4), 4)]
    assert all((a.epsilon or 0.0) > epsilon for a, epsilon in zip(stated.adversaries, taken, strict=True))


def test_with_a_bound_that_rises_numbers_along_directions_rise_with_it(tmp_path: Path):
    """What a user sends is held to the bound of the round, and not to the one that the run began with."""
    method = {
        "train": "head",
        "gradient": "zeroth_order",
        "zeroth_probes": 2,
        "clipping": "adaptive",
        "clip_norm": 1e-4,
    }
    engine: Any = sessions.load_parts(config(tmp_path, method=method), "key").engine
    norms = []
    for bound in (1e-4, 1e-3):
        engine.clipping.thresholds = [bound]
        ((_, sent),) = engine.carrier(engine.order(0), np.array([3]))
        norms.append(float(sent.norm()))
    assert norms == [pytest.approx(1e-4, rel=1e-5), pytest.approx(1e-3, rel=1e-5)]

"""Whole runs: what is trained, what is noised and how often, what is charged, and what leaves the run folder."""

from __future__ import annotations

import importlib.metadata
import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch

import sotto
from sotto import cli, commands, training
from sotto import session as sessions
from sotto.data.sampling import PoissonSampler
from sotto.errors import BudgetExceeded, SottoError
from sotto.privacy.ledger import Ledger, ledger_dir
from sotto.privacy.mechanism import GaussianMechanism
from sotto.privacy.plan import Plan

DEBUG = {"debug_noise_seed": 11}


def run(folder: Path, kind: str = "classification", **changes: Any) -> Any:
    """A `sotto.Run`; its optional parts are there or not as the test expects."""
    return sotto.train(tiny_runs.config(folder, kind, **changes))


def ledgers() -> list[Ledger]:
    return [Ledger.open(path.stem) for path in ledger_dir().glob("*.jsonl")]


def charged() -> int:
    return sum(record.reserved for ledger in ledgers() for record in ledger.runs.values())


# ---- end to end


@pytest.mark.parametrize("kind", tiny_runs.KINDS)
def test_a_run_gives_a_model_and_a_statement(tmp_path: Path, kind: str) -> None:
    done = run(tmp_path, kind)
    assert done.finished
    assert done.steps == 4
    assert 0 < done.epsilon <= 8.0
    assert not done.model.training
    facts = json.loads((done.path / "privacy.json").read_text())
    assert facts["private"] is True
    assert facts["epsilon"] >= done.epsilon - 1e-9
    assert facts["steps"] == facts["steps_charged"] == charged() == 4
    assert (done.path / "model" / "privacy.json").read_text() == (done.path / "privacy.json").read_text()
    assert (done.path / "statement.txt").read_text() == done.statement
    assert done.statement in (done.path / "model" / "README.md").read_text()
    (ledger,) = ledgers()
    assert ledger.runs[done.path.name].closed
    live = dict(done.model.state_dict())
    stored = sotto.load(done.path / "model").state_dict()
    for name, value in stored.items():
        assert torch.equal(value, live[name]), name


TRAINED = {
    "full": lambda name: True,
    "bitfit": lambda name: name.endswith("bias") or "classifier" in name,
    "head": lambda name: "classifier" in name,
    "lora": lambda name: "embeddings" not in name and "LayerNorm" not in name,
}


@pytest.mark.parametrize("method", TRAINED)
def test_the_method_says_what_changes(tmp_path: Path, method: str) -> None:
    done = run(tmp_path, method={"train": method}, run=DEBUG)
    # A rate of almost nothing: the same folder with the weights as they were.
    before = tiny_runs.final_weights(
        run(tmp_path, method={"train": method}, run={**DEBUG, "learning_rate": 1e-30}).path
    )
    after = tiny_runs.final_weights(done.path)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(TRAINED[method](name) for name in changed), changed


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize(
    ("kind", "train"), [("classification", "full"), ("completion", "lora"), ("plain_text", "full")]
)
def test_every_gradient_algorithm_gives_the_same_weights(tmp_path: Path, kind: str, train: str, clipping: str) -> None:
    def weights(gradient: str) -> dict[str, torch.Tensor]:
        # SGD, because Adam's first steps blow rounding up: they depend on the sign of a gradient only.
        changes = {"optimizer": "sgd", "learning_rate": 0.5, **DEBUG}
        method = {"train": train, "clipping": clipping, "gradient": gradient}
        return tiny_runs.final_weights(run(tmp_path, kind, method=method, run=changes).path)

    oracle = weights("per_example")
    for gradient in ("ghost", "book_keeping", "auto"):
        tiny_runs.assert_same(oracle, weights(gradient), tolerance=1e-5)


@pytest.mark.parametrize("size", [1, 5, 64, "auto"])
def test_the_microbatch_size_never_changes_the_result(tmp_path: Path, size: int | str) -> None:
    def weights(microbatch: int | str) -> dict[str, torch.Tensor]:
        changes = {"optimizer": "sgd", "learning_rate": 0.5, "microbatch_size": microbatch, **DEBUG}
        return tiny_runs.final_weights(run(tmp_path, run=changes).path)

    tiny_runs.assert_same(weights(8), weights(size), tolerance=1e-5)


@pytest.mark.parametrize("kind", ["classification", "completion"])
def test_bfloat16_trains_float32_weights(tmp_path: Path, kind: str) -> None:
    done = run(tmp_path, kind, model={"dtype": "bfloat16"})
    weights = tiny_runs.final_weights(done.path)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in weights.values())


@pytest.mark.parametrize("gradient", ["auto", "layerwise"])
def test_adaptive_thresholds_move_are_public_and_cost_nothing_more(tmp_path: Path, gradient: str) -> None:
    method = {"clipping": "adaptive", "clip_norm": 1e-3, "gradient": gradient, "clip_share": 0.1}
    done = run(tmp_path, method=method, run={"steps": 8})
    flat = run(tmp_path, run={"steps": 8})
    assert done.epsilon == flat.epsilon
    lines = [json.loads(line) for line in (done.path / "metrics.public.jsonl").read_text().splitlines()]
    used = [line["clip_norm"] for line in lines]
    assert used[0] == pytest.approx(1e-3)
    assert len(set(used)) == 8
    statement = " ".join((done.statement or "").split())
    assert "followed noisy counts" in statement
    assert ("each layer of its gradient" in statement) == (gradient == "layerwise")


@pytest.mark.parametrize("method", [{"clipping": "adaptive"}, {"gradient": "layerwise"}], ids=str)
def test_a_run_goes_on_exactly_where_it_stopped(
    tmp_path: Path, method: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path, method=method, run=DEBUG)
    original, calls = training.save_checkpoint, []

    def stop_after_two(session: Any) -> None:
        original(session)
        calls.append(session.step)
        if len(calls) == 2:
            raise RuntimeError("power failure")

    monkeypatch.setattr(training, "save_checkpoint", stop_after_two)
    other = tiny_runs.config(tmp_path, method=method, run=DEBUG, output={"dir": str(tmp_path / "other")})
    with pytest.raises(RuntimeError, match="power"):
        sotto.train(other)
    (stopped,) = sotto.ls(tmp_path / "other")
    again = sotto.resume(stopped["run"])
    tiny_runs.assert_same(tiny_runs.final_weights(whole.path), tiny_runs.final_weights(again.path))


def test_dropout_and_every_optimizer_setting_run(tmp_path: Path) -> None:
    changes = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "schedule": "cosine", "warmup_ratio": 0.3}
    done = run(tmp_path, method={"dropout": True, "clipping": "automatic"}, run={**changes, "ema_decay": 0.5})
    assert done.finished


def test_the_average_of_the_weights_is_what_is_released(tmp_path: Path) -> None:
    last = run(tmp_path, run=DEBUG)
    averaged = run(tmp_path, run={**DEBUG, "ema_decay": 0.9})
    first = tiny_runs.final_weights(run(tmp_path, run={**DEBUG, "learning_rate": 1e-30}).path)
    end, mean = tiny_runs.final_weights(last.path), tiny_runs.final_weights(averaged.path)
    name = "classifier.weight"
    assert 0 < float((mean[name] - first[name]).norm()) < float((end[name] - first[name]).norm())
    exported = sotto.export(averaged.path, tmp_path / "again")
    tiny_runs.assert_same(mean, tiny_runs.load_file(exported / "model.safetensors"))


# ---- noise: once for each step, in every step


class Counted:
    """Counts calls of the mechanism, and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.steps: list[int] = []
        self.units: list[int] = []
        self.divisors: set[float] = set()
        original = GaussianMechanism.privatize

        def counted(mechanism: GaussianMechanism, total: Any, step: int) -> Any:
            self.steps.append(step)
            self.units.append(len(total.norms))
            self.divisors.add(mechanism.divisor)
            return original(mechanism, total, step)

        monkeypatch.setattr(GaussianMechanism, "privatize", counted)


def test_a_step_is_noised_once_however_many_microbatches_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    run(tmp_path, run={"microbatch_size": 2})
    assert counted.steps == [0, 1, 2, 3]


def test_an_empty_batch_is_noised_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoissonSampler, "draw", lambda self, step, attempt=0: np.zeros(0, dtype=np.int64))
    counted = Counted(monkeypatch)
    still = tiny_runs.final_weights(run(tmp_path, run={"learning_rate": 1e-30}).path)
    moved = tiny_runs.final_weights(run(tmp_path).path)
    assert counted.steps == [0, 1, 2, 3] * 2
    assert set(counted.units) == {0}
    assert charged() == 8
    assert all(not torch.equal(still[name], moved[name]) for name in still if "position" not in name)


def test_the_divisor_is_the_public_constant_whatever_the_data_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    for units in (45, 60, 75):
        other = tiny_runs.write_csv(tmp_path / f"{units}.csv", tiny_runs.rows(units))
        run(tmp_path, data={"train": str(other)})
    assert counted.divisors == {12}


def test_the_sampling_probability_comes_from_the_declared_number(tmp_path: Path) -> None:
    larger = tiny_runs.write_csv(tmp_path / "more.csv", tiny_runs.rows(75))
    session = sessions.start(tiny_runs.config(tmp_path, data={"train": str(larger)}), "x")
    assert session.sampler.sampling_prob == session.plan.sampling_prob == 12 / 60
    assert session.sampler.num_units == 75
    session.held.close()


# ---- out of memory


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An allocator that refuses more than three examples at a time; returns the sizes that were tried."""
    tried: list[int] = []
    original = training.losses_of

    def losses_of(session: training.Session, examples: np.ndarray) -> torch.Tensor:
        tried.append(len(examples))
        if len(examples) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return original(session, examples)

    monkeypatch.setattr(training, "losses_of", losses_of)
    return tried


def test_out_of_memory_halves_the_microbatch_within_the_same_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    changes = {"optimizer": "sgd", "learning_rate": 0.5, "microbatch_size": 32, **DEBUG}
    expected = tiny_runs.final_weights(run(tmp_path, run=changes).path)
    tried = request.getfixturevalue("small_memory")
    counted = Counted(monkeypatch)
    done = run(tmp_path, run=changes)
    assert max(tried) > 3
    assert counted.steps == [0, 1, 2, 3]
    tiny_runs.assert_same(expected, tiny_runs.final_weights(done.path), tolerance=1e-5)


def test_a_step_that_was_halved_is_charged_once(tmp_path: Path, small_memory: list[int]) -> None:
    run(tmp_path, run={"microbatch_size": 32})
    assert charged() == 4


def test_what_does_not_fit_at_all_is_an_error_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses_of(session: training.Session, examples: np.ndarray) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(training, "losses_of", losses_of)
    with pytest.raises(SottoError, match="max_length") as caught:
        run(tmp_path)
    assert caught.value.code == "SOT513"
    assert charged() == 0, "the first-batch check met it before anything was reserved"
    with pytest.raises(SottoError) as caught:
        run(tmp_path, method={"gradient": "per_example"})
    assert caught.value.code == "SOT513"


def test_other_errors_are_not_taken_for_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses_of(session: training.Session, examples: np.ndarray) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(training, "losses_of", losses_of)
    with pytest.raises(RuntimeError, match="shapes"):
        run(tmp_path)


# ---- one bad example


def poison(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Multiplies the loss of every example of unit 0 (which is in every batch here) by `value`."""
    original_losses, original_draw = training.losses_of, PoissonSampler.draw

    def losses_of(session: training.Session, examples: np.ndarray) -> torch.Tensor:
        losses = original_losses(session, examples)
        members = session.data.units.members_of(np.array([0]))[0]
        factors = torch.ones_like(losses)
        factors[torch.from_numpy(np.isin(examples, members))] = value
        return losses * factors

    def draw(sampler: PoissonSampler, step: int, attempt: int = 0) -> np.ndarray:
        return np.union1d(original_draw(sampler, step, attempt), [0])

    monkeypatch.setattr(training, "losses_of", losses_of)
    monkeypatch.setattr(PoissonSampler, "draw", draw)


@pytest.mark.parametrize("gradient", ["per_example", "ghost", "book_keeping"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_example_changes_nothing_but_itself(tmp_path: Path, gradient: str, value: float) -> None:
    changes: Any = {"run": {"optimizer": "sgd", "learning_rate": 0.5, **DEBUG}, "method": {"gradient": gradient}}
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, 0.0)
        without = run(tmp_path, **changes)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, value)
        with_it = run(tmp_path, **changes)
    assert with_it.steps == 4
    tiny_runs.assert_same(tiny_runs.final_weights(without.path), tiny_runs.final_weights(with_it.path), tolerance=1e-6)
    lines = (with_it.path / "metrics.private.jsonl").read_text().splitlines()
    assert [json.loads(line)["not_finite"] for line in lines] == [1] * 4


# ---- runs without a guarantee


@pytest.mark.parametrize(
    "changes", [{"privacy": {"epsilon": "none"}}, {"run": DEBUG}], ids=["epsilon_none", "debug_noise_seed"]
)
def test_a_run_that_is_not_private_says_so_everywhere(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path, **changes)
    assert done.epsilon is None
    assert done.statement is None
    assert not (done.path / "statement.txt").exists()
    reason = json.loads((done.path / "plan.json").read_text())["not_private"]
    assert reason
    facts = json.loads((done.path / "privacy.json").read_text())
    assert facts == {"private": False, "reason": reason, "steps": done.steps}
    card = (done.path / "model" / "README.md").read_text()
    assert "NOT PRIVATE" in card
    assert "not-private" in card
    assert "epsilon:" not in card
    assert not (done.path / "model" / "privacy.json").exists()
    exported = json.loads((done.path / "model" / "config.json").read_text())
    assert exported["sotto"]["dp"] == {"private": False}
    assert sotto.show(done.path).startswith("NOT PRIVATE")
    (listed,) = sotto.ls(tmp_path / "runs")
    assert listed["private"] is False
    assert listed["epsilon"] is None
    cli.ls(tmp_path / "runs")
    assert "NOT PRIVATE" in capsys.readouterr().out
    assert charged() == 0
    public = (done.path / "metrics.public.jsonl").read_text()
    assert "update_norm" not in public, "without noise the norm of the update is a function of the text"


def test_the_debug_seed_makes_a_run_repeatable_and_no_seed_does_not(tmp_path: Path) -> None:
    once, again = run(tmp_path, run=DEBUG), run(tmp_path, run=DEBUG)
    tiny_runs.assert_same(tiny_runs.final_weights(once.path), tiny_runs.final_weights(again.path))
    with pytest.raises(AssertionError):
        tiny_runs.assert_same(tiny_runs.final_weights(run(tmp_path).path), tiny_runs.final_weights(run(tmp_path).path))


def test_the_sampling_key_is_fresh_and_follows_from_no_seed(tmp_path: Path) -> None:
    keys = set()
    for seed in (0, 0, 1, 1):
        session = sessions.start(tiny_runs.config(tmp_path, run={"seed": seed}), "x")
        session.held.close()
        secret = json.loads((session.run.path / "private" / "secrets.json").read_text())
        assert session.sampler._key == bytes.fromhex(secret["sampling_key"])
        keys.add(secret["sampling_key"])
    assert len(keys) == 4


# ---- nothing before everything is checked


def leftovers(folder: Path) -> list[Path]:
    runs = folder / "runs"
    return [*runs.iterdir()] if runs.exists() else []


def assert_nothing_happened(folder: Path) -> None:
    assert leftovers(folder) == []
    assert charged() == 0
    assert all(not record.outstanding for ledger in ledgers() for record in ledger.runs.values())


def test_a_failing_self_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = training.losses_of

    def coupled(session: training.Session, examples: np.ndarray) -> torch.Tensor:
        losses = original(session, examples)
        return losses + 0.5 * losses.mean()

    monkeypatch.setattr(training, "losses_of", coupled)
    with pytest.raises(SottoError) as caught:
        run(tmp_path)
    assert caught.value.code.startswith("SOT6")
    assert_nothing_happened(tmp_path)


def test_ctrl_c_while_the_run_is_announced_leaves_nothing_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Ledger.open_run

    def interrupted(self: Ledger, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "open_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert_nothing_happened(tmp_path)


def test_tensorboard_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SottoError) as caught:
        run(tmp_path, output={"tensorboard": True})
    assert caught.value.code == "SOT504"
    assert_nothing_happened(tmp_path)


# ---- the ledger


def test_steps_are_paid_for_before_the_data_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    session = sessions.start(tiny_runs.config(tmp_path), "x")

    def spy(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if label == "touch":
                # On the disk, not only in this process.
                (ledger,) = ledgers()
                assert ledger.reserved(session.run.id) == order.count("pay")
            order.append(label)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    spy(session.budget, "reserve", "pay")
    spy(session.sampler, "draw", "touch")
    spy(session.mechanism, "privatize", "release")
    commands.run_session(session, None)
    assert order == ["pay", "touch", "release"] * 4


def test_a_run_over_the_budget_of_the_dataset_is_refused(tmp_path: Path) -> None:
    config = tiny_runs.config(tmp_path)
    first: Any = sotto.train(config)
    sotto.ledger(config, epsilon=first.epsilon + 0.5)
    with pytest.raises(BudgetExceeded) as caught:
        sotto.train(config)
    assert caught.value.exit_code == 3
    assert len(leftovers(tmp_path)) == 1
    assert charged() == 4
    summary = sotto.ledger(config)
    assert summary["total"] <= first.epsilon + 1e-9
    assert summary["total_delta"] == config.privacy.delta


def test_runs_on_one_dataset_compose(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path, method={"train": "head"})
    facts = json.loads((second.path / "privacy.json").read_text())
    plan = Plan.from_dict(json.loads((first.path / "plan.json").read_text()))
    assert facts["dataset_epsilon"] == pytest.approx(plan.epsilon_after(first.steps + second.steps), abs=1e-6)
    assert 1.1 * first.epsilon < facts["dataset_epsilon"] < first.epsilon + second.epsilon
    assert "(2 in the ledger)" in second.statement


def test_a_run_stops_before_the_step_that_would_pass_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sessions.start(tiny_runs.config(tmp_path, run={"spare_steps": 1, "checkpoint_every": 100}), "x")
    # As after crashes that cost three steps: of the five that were paid for, two are left.
    for step in (0, 0, 1):
        session.budget.reserve(step)
    done: Any = commands.run_session(session, None)
    assert done.finished
    assert done.steps == 2
    assert charged() == session.plan.total_steps == 5
    assert done.epsilon <= 8.0
    assert "would have passed the budget" in done.notes[0]
    facts = json.loads((done.path / "privacy.json").read_text())
    assert (facts["steps"], facts["steps_charged"]) == (2, 5)
    # What is exported later is what was released then, although no checkpoint was due.
    again = tiny_runs.load_file(sotto.export(done.path, tmp_path / "again") / "model.safetensors")
    tiny_runs.assert_same(tiny_runs.final_weights(done.path), again)


def test_a_full_ledger_disk_stops_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = sessions.start(tiny_runs.config(tmp_path), "x")
    monkeypatch.setattr(
        "sotto.privacy.chain._write_all", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    draws: list[int] = []
    monkeypatch.setattr(session.sampler, "draw", lambda *a: draws.append(1))
    with pytest.raises(SottoError) as caught:
        commands.run_session(session, None)
    assert caught.value.code == "SOT412"
    assert draws == []


# ---- who may read what


def test_private_files_are_for_the_owner_alone(tmp_path: Path) -> None:
    done = run(tmp_path)
    for path in (*(done.path / "private").iterdir(), done.path / "metrics.private.jsonl"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for folder in ("private", "checkpoints"):
        assert stat.S_IMODE((done.path / folder).stat().st_mode) == 0o700
    names = {"secrets.json", "data_report.json", "settled.json", "seal.json", "lock"}
    assert {path.name for path in (done.path / "private").iterdir()} == names


@pytest.mark.parametrize("kind", tiny_runs.KINDS)
def test_nothing_private_is_in_what_is_released(tmp_path: Path, kind: str) -> None:
    tiny_runs.write_csv(tmp_path / "eval.csv")
    done = run(tmp_path, kind)
    secret = json.loads((done.path / "private" / "secrets.json").read_text())
    data = tiny_runs.config(tmp_path, kind).data.train
    private_lines = [json.loads(line) for line in (done.path / "metrics.private.jsonl").read_text().splitlines()]
    needles = {tiny_runs.CANARY.encode(), b"patient-", secret["data"].encode(), secret["ledger"].encode()}
    needles |= {secret["ledger"].partition(".")[0].encode(), str(tmp_path).encode(), Path(data).name.encode()}
    needles |= {secret["sampling_key"].encode(), bytes.fromhex(secret["sampling_key"])}
    needles |= {repr(line["median_norm"]).encode() for line in private_lines if line["median_norm"]}
    released = [done.path / "model", done.path / "privacy.json", done.path / "statement.txt", done.path / "plan.json",
                done.path / "metrics.public.jsonl"]  # fmt: skip
    files = [file for path in released for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        found = [needle for needle in needles if needle in content]
        assert not found, (file, found)
    # The search itself finds what is there.
    assert tiny_runs.CANARY.encode() in Path(data).read_bytes()
    assert secret["sampling_key"].encode() in (done.path / "private" / "secrets.json").read_bytes()


def test_public_metrics_hold_only_public_numbers(tmp_path: Path) -> None:
    done = run(tmp_path)
    public = [json.loads(line) for line in (done.path / "metrics.public.jsonl").read_text().splitlines()]
    assert [line["step"] for line in public] == [1, 2, 3, 4]
    keys = {"step", "learning_rate", "update_norm", "noise_multiplier", "clip_norm"}
    assert {key for line in public for key in line} == keys
    private = [json.loads(line) for line in (done.path / "metrics.private.jsonl").read_text().splitlines()]
    keys = {"step", "units", "clipped_fraction", "median_norm", "not_finite"}
    assert {key for line in private for key in line} == keys


def test_progress_is_reported_after_every_step(tmp_path: Path) -> None:
    seen: list[int] = []
    sotto.train(tiny_runs.config(tmp_path), progress=lambda step, values: seen.append(step))
    assert seen == [1, 2, 3, 4]


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    run(tmp_path, method={"dropout": True}, run={**DEBUG, "steps": 2})
    assert torch.equal(torch.rand(1), expected)


def test_two_sessions_share_nothing(tmp_path: Path) -> None:
    first = sessions.start(tiny_runs.config(tmp_path, run=DEBUG), "a")
    second = sessions.start(tiny_runs.config(tmp_path, run=DEBUG), "b")
    assert first.run.path != second.run.path
    one, two = commands.run_session(second, None), commands.run_session(first, None)
    tiny_runs.assert_same(tiny_runs.final_weights(one.path), tiny_runs.final_weights(two.path))


def test_a_library_whose_version_is_not_known_spoils_no_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    done = run(tmp_path)
    found = json.loads((done.path / "privacy.json").read_text())
    assert sotto.__version__ in json.dumps(found)
    assert "unknown" in json.dumps(found)

"""Runs that are killed, stopped, starved of disk or tampered with, and then resumed."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors import SafetensorError

import sotto
from sotto import checkpoint, commands
from sotto import session as sessions
from sotto.errors import BudgetExceeded, SottoError
from sotto.privacy.ledger import Ledger, ledger_dir
from sotto.privacy.plan import Plan

STEPS = 6
DEBUG: dict[str, Any] = {"run": {"debug_noise_seed": 5, "steps": STEPS}}
REAL: dict[str, Any] = {"run": {"steps": STEPS, "spare_steps": 100}}


def record(run: Path) -> Any:
    """What the ledger knows of a run."""
    secret = json.loads((run / "private" / "secrets.json").read_text())
    return Ledger.open(secret["ledger"]).runs[run.name]


def killed(process: Any) -> None:
    """Waits for a process that kills itself, if it does not finish first."""
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode


def found(folder: Path) -> Path | None:
    """The run that has got as far as having a folder."""
    listed = sotto.ls(folder / "runs")
    assert len(listed) <= 1
    return Path(listed[0]["run"]) if listed else None


def finish(folder: Path, config: Path) -> Path:
    """Resumes the run, or starts it if a crash came before it had a folder."""
    run = found(folder)
    done = sotto.train(config) if run is None else sotto.resume(run)
    assert done.finished
    return done.path


def check_the_bill(run: Path, everything: bool = True) -> None:
    """What the statement says covers all that was charged, and no step is missing."""
    facts, plan = json.loads((run / "privacy.json").read_text()), Plan.from_dict(
        json.loads((run / "plan.json").read_text())
    )  # fmt: skip
    entry = record(run)
    assert entry.closed
    assert entry.reserved == facts["steps_charged"] >= facts["steps"]
    assert facts["epsilon"] >= plan.epsilon_after(entry.reserved) - 1e-9
    assert facts["epsilon"] <= plan.epsilon
    if everything:
        assert facts["steps"] == plan.steps
        assert set(entry.attempts) == set(range(plan.steps))


@pytest.fixture
def uninterrupted(tmp_path: Path) -> dict[str, torch.Tensor]:
    """The weights of a debug run that nobody disturbed."""
    config = tiny_runs.config(tmp_path, **DEBUG, output={"dir": str(tmp_path / "undisturbed")})
    return tiny_runs.final_weights(sotto.train(config).path)


# ---- kill -9


def boundaries(folder: Path, config: Path) -> int:
    """How many boundaries a whole run has: one that waits for a boundary beyond the last finishes."""
    low, high = 1, 400
    while low < high:
        middle = (low + high) // 2
        process = tiny_runs.command(folder, "train", config, kill_at=middle)
        process.join(60)
        low, high = (middle + 1, high) if process.exitcode else (low, middle)
    return low


def kill_debug_run(folder: Path, kill_at: int, expected: dict[str, torch.Tensor]) -> None:
    here = folder / f"debug-{kill_at}"
    here.mkdir()
    config = tiny_runs.write_yaml(here, **DEBUG)
    killed(tiny_runs.command(here, "train", config, kill_at=kill_at))
    tiny_runs.assert_same(expected, tiny_runs.final_weights(finish(here, config)))


def kill_private_run(folder: Path, kill_at: int) -> None:
    here = folder / f"real-{kill_at}"
    here.mkdir()
    config = tiny_runs.write_yaml(here, **REAL)
    killed(tiny_runs.command(here, "train", config, kill_at=kill_at))
    run = finish(here, config)
    check_the_bill(run)
    assert record(run).reserved <= STEPS + 1, "one crash loses one step at most"


@pytest.mark.parametrize("kill_at", [5, 17, 21, 22, 68, 78])
def test_killed_at_every_kind_of_moment(tmp_path: Path, uninterrupted: dict[str, torch.Tensor], kill_at: int) -> None:
    kill_debug_run(tmp_path, kill_at, uninterrupted)


@pytest.mark.parametrize("kill_at", [15, 17, 18, 19, 25, 27, 77, 86, 92])
def test_killed_at_every_kind_of_moment_nothing_is_under_counted(tmp_path: Path, kill_at: int) -> None:
    """15: a folder but no ledger. 17: announced. 18: first charge. 19, 25: checkpoint. 77 on: export, statement."""
    kill_private_run(tmp_path, kill_at)


@pytest.mark.slow
def test_killed_at_every_single_boundary(tmp_path: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    (tmp_path / "count").mkdir()
    config = tiny_runs.write_yaml(tmp_path / "count", **REAL)
    for kill_at in range(boundaries(tmp_path / "count", config)):
        kill_debug_run(tmp_path, kill_at, uninterrupted)
        kill_private_run(tmp_path, kill_at)


LONG = {"steps": 25, "checkpoint_every": 2}


@pytest.fixture
def long_uninterrupted(tmp_path: Path) -> dict[str, torch.Tensor]:
    changes = {**LONG, "debug_noise_seed": 5}
    config = tiny_runs.config(tmp_path, run=changes, output={"dir": str(tmp_path / "long")})
    return tiny_runs.final_weights(sotto.train(config).path)


def kill_at_random(folder: Path, kills: int, expected: dict[str, torch.Tensor] | None, seed: int) -> int:
    """Trains, is killed at random moments again and again, and finishes. Returns how often it was killed."""
    generator = random.Random(seed)
    folder.mkdir()
    changes = {"spare_steps": 200} if expected is None else {"debug_noise_seed": 5}
    config = tiny_runs.write_yaml(folder, run={**LONG, **changes})
    hits = 0
    for _ in range(kills):
        run = found(folder)
        words = ("train", config) if run is None else ("resume", run)
        # From a boundary on, not from the start: the moment is then random in the work, whatever the machine's speed.
        moment = {"kill_at": generator.randint(0, 60), "delay": generator.uniform(0, 0.02)}
        process = tiny_runs.command(folder, *words, **moment)
        killed(process)
        hits += process.exitcode != 0
        if process.exitcode == 0:
            break
    run = finish(folder, config)
    if expected is not None:
        tiny_runs.assert_same(expected, tiny_runs.final_weights(run))
    else:
        check_the_bill(run)
        assert record(run).reserved <= LONG["steps"] + 2 * hits, "a crash loses the steps since the last checkpoint"
    return hits


def test_killed_at_random_moments(tmp_path: Path, long_uninterrupted: dict[str, torch.Tensor]) -> None:
    hits = kill_at_random(tmp_path / "debug", 4, long_uninterrupted, seed=1)
    hits += kill_at_random(tmp_path / "real", 4, None, seed=2)
    assert hits >= 2, "most of these moments lie within the run"


@pytest.mark.slow
def test_sixty_kills(tmp_path: Path, long_uninterrupted: dict[str, torch.Tensor]) -> None:
    hits, seed = 0, 0
    while hits < 60:
        hits += kill_at_random(tmp_path / f"debug-{seed}", 5, long_uninterrupted, seed)
        hits += kill_at_random(tmp_path / f"real-{seed}", 5, None, seed + 1000)
        seed += 1


def test_the_command_line_itself_can_be_killed(tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path, **REAL)
    command = [sys.executable, "-m", "sotto.cli", "train", str(config), "--set", "run.steps=100"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads only get into each other's way here
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, **quiet) as process:
        run = wait_for_steps(tmp_path, process, 3)
        process.kill()
    before = record(run).reserved
    assert 3 <= before < 100
    session = sessions.resume(run)
    assert before - 1 <= session.step <= before
    session.held.close()


def test_steps_that_are_lost_are_charged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same crash in every attempt: the batch is drawn anew, and paid for, each time."""
    config = tiny_runs.config(tmp_path, **REAL)
    batches: list[tuple[int, int]] = []
    session = sessions.start(config, "x")
    run = session.run.path
    for _ in range(3):
        original = session.sampler.draw

        def draw(step: int, attempt: int = 0, original: Any = original) -> Any:
            batches.append((step, attempt))
            if step == 2:
                raise RuntimeError("power failure")
            return original(step, attempt)

        monkeypatch.setattr(session.sampler, "draw", draw)
        with pytest.raises(RuntimeError, match="power"):
            commands.run_session(session, None)
        session = sessions.resume(run)
        assert session.step == 2
    session.held.close()
    assert batches == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]
    done = sotto.resume(run)
    check_the_bill(done.path)
    assert record(run).reserved == STEPS + 3
    assert "3 step(s) were lost" in (done.statement or "")


def test_when_the_spare_steps_are_used_up_the_run_ends_early(tmp_path: Path) -> None:
    session = sessions.start(tiny_runs.config(tmp_path, run={"steps": STEPS, "spare_steps": 1}), "x")
    for _ in range(4):
        session.budget.reserve(0)
    session.held.close()
    done = sotto.resume(session.run.path)
    assert done.finished
    assert done.steps == 3
    check_the_bill(done.path, everything=False)
    assert record(done.path).reserved == STEPS + 1


# ---- stopped


def wait_for_steps(folder: Path, process: Any, steps: int) -> Path:
    alive = process.poll if isinstance(process, subprocess.Popen) else lambda: process.exitcode
    end = time.monotonic() + 60
    while time.monotonic() < end and alive() is None:
        run = found(folder)
        if run is not None and tiny_runs.steps_done(run) >= steps:
            return run
        time.sleep(0.01)
    raise AssertionError(f"no {steps} steps were taken")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_with_130(tmp_path: Path, number: signal.Signals) -> None:
    changes = {"debug_noise_seed": 5, "steps": 60, "checkpoint_every": 1000}
    config = tiny_runs.write_yaml(tmp_path, run=changes)
    process = tiny_runs.command(tmp_path, "train", config)
    run = wait_for_steps(tmp_path, process, 2)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 130
    assert f"sotto resume {run}" in (tmp_path / "output").read_text()
    taken = tiny_runs.steps_done(run)
    assert 2 <= taken < 60
    session = sessions.resume(run)
    assert session.step == taken, "nothing was lost"
    session.held.close()
    done = sotto.resume(run)
    other = tiny_runs.config(tmp_path, run=changes, output={"dir": str(tmp_path / "undisturbed")})
    tiny_runs.assert_same(tiny_runs.final_weights(sotto.train(other).path), tiny_runs.final_weights(done.path))


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = sessions.start(tiny_runs.config(tmp_path, **REAL), "x")
    original = session.sampler.draw

    def draw(step: int, attempt: int = 0) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, attempt)

    monkeypatch.setattr(session.sampler, "draw", draw)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        commands.run_session(session, None)
    assert signal.getsignal(signal.SIGINT) is handler
    assert record(session.run.path).reserved == 3
    check_the_bill(sotto.resume(session.run.path).path)


def test_ctrl_c_in_python_returns_an_unfinished_run(tmp_path: Path) -> None:
    def press(step: int, values: dict[str, Any]) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = sotto.train(tiny_runs.config(tmp_path, **REAL), progress=press)
    assert not stopped.finished
    assert stopped.steps == 3
    assert stopped.statement is None
    assert stopped.epsilon is None
    assert "sotto resume" in sotto.show(stopped.path)
    check_the_bill(sotto.resume(stopped.path).path)
    assert record(stopped.path).reserved == STEPS, "a stop in good order loses no step"


def test_ctrl_c_while_the_model_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sotto.finish.card.render", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sotto.train(tiny_runs.config(tmp_path, **REAL))
    run = tiny_runs.only_run(tmp_path)
    assert sotto.ls(tmp_path / "runs")[0]["state"] == "unfinished"
    assert "Unfinished" in sotto.show(run)
    done = sotto.resume(run)
    assert (done.path / "model" / "README.md").exists()
    check_the_bill(done.path)


# ---- damaged


def stopped_after(folder: Path, step: int, **changes: Any) -> Path:
    """A run that was stopped in good order after some steps."""
    session = sessions.start(tiny_runs.config(folder, **changes), "x")

    def stop(done: int, values: dict[str, Any]) -> None:
        session.stop_requested = done >= step

    assert not commands.run_session(session, stop).finished
    return session.run.path


def truncate(folder: Path) -> None:
    with open(folder / "weights.safetensors", "r+b") as file:
        file.truncate(100)


def flip(folder: Path) -> None:
    content = bytearray((folder / "optimizer.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "optimizer.safetensors").write_bytes(content)


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def garble_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1, 2]")


def lose_state(folder: Path) -> None:
    (folder / "state.json").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, lose_manifest, garble_manifest, lose_state])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor], damage: Any
) -> None:
    run = stopped_after(tmp_path, 4, **DEBUG)
    damage(run / "checkpoints" / "step-00000004")
    session = sessions.resume(run)
    assert session.step == 3
    done = commands.run_session(session, None)
    assert "step-00000004 is damaged" in done.notes[0]
    tiny_runs.assert_same(uninterrupted, tiny_runs.final_weights(done.path))


def test_without_any_whole_checkpoint_the_run_starts_over_and_pays_again(tmp_path: Path) -> None:
    run = stopped_after(tmp_path, 4, **REAL)
    for folder in (run / "checkpoints").iterdir():
        truncate(folder)
    done = sotto.resume(run)
    assert len(done.notes) == 2
    check_the_bill(done.path)
    assert record(run).reserved == STEPS + 4


@pytest.mark.parametrize("moment", [1, 2, 5])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor], moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sessions.start(tiny_runs.config(tmp_path, **DEBUG), "x")
    calls: list[Path] = []
    original = checkpoint.save_file

    def save_file(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 2 * moment:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(SottoError, match="No space left") as caught:
        commands.run_session(session, None)
    assert caught.value.code == "SOT505"
    assert "sotto resume" in caught.value.fix
    monkeypatch.setattr(checkpoint, "save_file", original)
    names = sorted(path.name for path in session.run.checkpoints.iterdir())
    assert names == [f"step-{n:08d}" for n in range(max(1, moment - 1), moment + 1)]
    tiny_runs.assert_same(uninterrupted, tiny_runs.final_weights(sotto.resume(session.run.path).path))


@pytest.mark.parametrize("file", ["metrics.public.jsonl", "privacy.json", "model"])
def test_a_full_disk_elsewhere_is_an_error_without_a_traceback(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sessions.start(tiny_runs.config(tmp_path, **REAL), "x")

    def full(*args: Any, **kwargs: Any) -> None:
        if file == "model":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)

    where = {"metrics.public.jsonl": "sotto.metrics.Metrics.log", "privacy.json": "sotto.rundir.RunDir.write"}
    with monkeypatch.context() as patch:
        patch.setattr(where.get(file, "sotto.models.export.write_merged"), full)
        with pytest.raises(SottoError, match="No space left") as caught:
            commands.run_session(session, None)
    assert caught.value.code == "SOT505"
    check_the_bill(sotto.resume(session.run.path).path)


def test_a_torn_line_of_the_metrics_is_removed(tmp_path: Path) -> None:
    run = stopped_after(tmp_path, 3, **DEBUG)
    with open(run / "metrics.public.jsonl", "a") as file:
        file.write('{"step": 4, "learn')
    assert sotto.ls(tmp_path / "runs")[0]["step"] == 3
    sotto.resume(run)
    steps = [json.loads(line)["step"] for line in (run / "metrics.public.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_what_a_crash_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    run = stopped_after(tmp_path, 3, **DEBUG)
    litter = run / "checkpoints" / ".writing-00000004-1"
    litter.mkdir()
    (litter / "weights.safetensors").write_bytes(b"half")
    sotto.resume(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


# ---- changed, in use, finished


def test_changed_data_is_refused(tmp_path: Path) -> None:
    """Other labels, and the same texts dealt out to other people."""
    run = stopped_after(tmp_path, 3, **REAL)
    changed, dealt = tiny_runs.rows(), tiny_runs.rows()
    changed[7]["label"] = "good" if changed[7]["label"] != "good" else "bad"
    dealt[7]["who"] = next(row["who"] for row in dealt if row["who"] != dealt[7]["who"])
    for table in (changed, dealt):
        tiny_runs.write_csv(tmp_path / "notes.csv", table)
        with pytest.raises(SottoError) as caught:
            sotto.resume(run)
        assert caught.value.code == "SOT507"
        assert record(run).reserved == 3
    tiny_runs.write_csv(tmp_path / "notes.csv")
    check_the_bill(sotto.resume(run).path)


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("epsilon: 8.0", "epsilon: 9.0"),
        ("epsilon: 8.0", "epsilon: none"),
        ("delta: 0.0001", "delta: 0.001"),
        ("num_units: 60", "num_units: 70"),
        ("expected_batch_size: 12", "expected_batch_size: 20"),
        ("steps: 6", "steps: 60"),
        ("clip_norm: 1.0", "clip_norm: 10.0"),
        ("clipping: flat", "clipping: automatic"),
        ("seed: 0", "seed: 0\n  debug_noise_seed: 1"),
    ],
)
def test_a_configuration_that_was_edited_is_refused(
    tmp_path: Path, line: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_after(tmp_path, 1, **REAL)
    text = (run / "config.yaml").read_text()
    assert text.count(f"  {line}\n") == 1
    (run / "config.yaml").write_text(text.replace(line, other))
    with pytest.raises(SottoError) as caught:
        sotto.resume(run)
    assert caught.value.code == "SOT514"
    assert record(run).reserved == 1


def test_two_processes_on_one_run_are_refused(tmp_path: Path) -> None:
    session = sessions.start(tiny_runs.config(tmp_path, **REAL), "x")
    process = tiny_runs.command(tmp_path, "resume", session.run.path)
    process.join(60)
    assert process.exitcode == 2
    assert "SOT502" in (tmp_path / "output").read_text()
    with pytest.raises(SottoError) as caught:
        sotto.resume(session.run.path)
    assert caught.value.code == "SOT502"
    done = commands.run_session(session, None)
    check_the_bill(done.path)
    assert record(done.path).reserved == STEPS


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("changes", [REAL, DEBUG], ids=["private", "debug"])
def test_a_finished_run_can_be_resumed_without_harm(tmp_path: Path, changes: dict[str, Any]) -> None:
    done = sotto.train(tiny_runs.config(tmp_path, **changes))
    before, ledger = tree(done.path), tree(ledger_dir())
    (tmp_path / "notes.csv").unlink()  # even the data is not needed any more
    again = sotto.resume(done.path)
    assert tree(done.path) == before
    assert tree(ledger_dir()) == ledger
    assert again.finished
    assert (again.statement, again.steps) == (done.statement, done.steps)
    assert (again.epsilon or 0) >= (done.epsilon or 0)
    tiny_runs.assert_same(dict(done.model.state_dict()), dict(again.model.state_dict()))


def test_killed_between_the_last_file_and_the_last_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "close_run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sotto.train(tiny_runs.config(tmp_path, **REAL))
    run = tiny_runs.only_run(tmp_path)
    assert record(run).outstanding == 100
    sotto.resume(run)
    assert record(run).outstanding == 0
    check_the_bill(run)


def test_killed_before_the_run_was_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is there, the ledger knows nothing: the budget is asked now."""
    config = tiny_runs.config(tmp_path, **REAL)
    with monkeypatch.context() as patch:
        patch.setattr(sessions.shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(sessions, "_open_budget", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sotto.train(config)
    run = tiny_runs.only_run(tmp_path)
    sotto.ledger(config, epsilon=0.1)
    with pytest.raises(BudgetExceeded):
        sotto.resume(run)
    sotto.ledger(config, epsilon=100.0)
    check_the_bill(sotto.resume(run).path)


def test_dropout_is_the_same_after_a_resume(tmp_path: Path) -> None:
    changes = {**DEBUG, "method": {"dropout": True, "train": "full"}}
    other = tiny_runs.config(tmp_path, **changes, output={"dir": str(tmp_path / "undisturbed")})
    expected = tiny_runs.final_weights(sotto.train(other).path)
    run = stopped_after(tmp_path, 3, **changes)
    tiny_runs.assert_same(expected, tiny_runs.final_weights(sotto.resume(run).path))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "sgd"},
        {"ema_decay": 0.9, "schedule": "cosine", "warmup_ratio": 0.5},
    ],
)
def test_every_optimizer_resumes_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"run": {**DEBUG["run"], **changes}}
    other = tiny_runs.config(tmp_path, **settings, output={"dir": str(tmp_path / "undisturbed")})
    expected = tiny_runs.final_weights(sotto.train(other).path)
    run = stopped_after(tmp_path, 3, **settings)
    tiny_runs.assert_same(expected, tiny_runs.final_weights(sotto.resume(run).path))

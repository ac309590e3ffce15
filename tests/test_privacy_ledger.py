"""The ledger under-counts nothing: not after kills, full disks, edits, or several writers at once."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sotto import diagnosis
from sotto.errors import BudgetExceeded, SottoError
from sotto.privacy import accounting, chain
from sotto.privacy.accounting import Gaussian, PoissonGaussian
from sotto.privacy.events import PoissonLaplace
from sotto.privacy.ledger import Ledger, ledger_dir

EVENT = PoissonGaussian(1.0, 0.01)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger.open("clinic", tmp_path / "ledger")
    ledger.open_run("a", EVENT, 100, delta=1e-5)
    return ledger


def reopen(ledger: Ledger) -> Ledger:
    return Ledger.open(ledger.dataset_id, ledger.path.parent)


def damaged(ledger: Ledger, code="SOT411") -> SottoError:
    with pytest.raises(SottoError) as caught:
        reopen(ledger)
    assert caught.value.code == code
    return caught.value


def test_no_two_charges_of_a_step_are_told_the_same(ledger):
    """Two copies of a run's folder go on at once: the same step of both must not draw the same batch."""
    from sotto.session import LedgerBudget  # not above: the processes of other tests would all import torch

    plan = SimpleNamespace(total_steps=100, event=EVENT)
    one, other = (LedgerBudget(book, "a", plan) for book in (ledger, reopen(ledger)))
    assert [budget.reserve(7) for budget in (one, other, one, one, other)] == [0, 1, 2, 3, 4]
    assert [budget.reserve(8) for budget in (other, one)] == [0, 1]
    assert reopen(ledger).reserved("a") == 7


def test_counts_survive(ledger):
    for step in (0, 1, 2, 1, 2, 2):
        ledger.reserve("a", step, EVENT)
    for seen in (ledger, reopen(ledger)):
        assert seen.reserved("a") == 6
        assert [seen.attempts("a", step) for step in range(4)] == [1, 2, 3, 0]
        assert seen.events() == [(EVENT, 6)]
        assert seen.outstanding() == [(EVENT, 94)]
        assert seen.outstanding(excluding="a") == []
        assert seen.spent(1e-5) == accounting.epsilon(1.0, 0.01, 6, 1e-5)
        assert seen.reserved("unknown") == seen.attempts("unknown", 0) == 0
    ledger.close_run("a")
    ledger.close_run("a")
    assert reopen(ledger).outstanding() == []
    assert reopen(ledger).events() == [(EVENT, 6)]


def test_runs_of_both_relations_add_up_where_noise_has_no_accountant_under_one(tmp_path):
    """A pure run and one under replace_one, of the same people: an epsilon for both, never below the truth."""
    pure, gauss = PoissonLaplace(2.0, 0.5), Gaussian(4.0)
    ledger = Ledger.open("clinic", tmp_path / "ledger")
    ledger.open_run("pure", pure, 3, delta=1e-5)
    for step in range(3):
        ledger.reserve("pure", step, pure)

    def log_density(z: float, at: float) -> float:  # of a sum that the unit is part of half the time
        return math.log(0.5 * math.exp(-abs(z) / 2) + 0.5 * math.exp(-abs(z - at) / 2))

    truth = 3 * max(log_density(z, 1) - log_density(z, -1) for z in (x / 10 for x in range(-50, 51)))
    found = ledger.spent(1e-5, "replace_one")
    assert 3 * pure.pure_epsilon < truth < found < 1.3 * truth
    ledger.open_run("gauss", gauss, 2, delta=1e-5, neighboring_relation="replace_one")
    for step in range(2):
        ledger.reserve("gauss", step, gauss)
    other = accounting.composed_epsilon([(gauss, 2)], 1e-5, "replace_one")
    assert ledger.spent(1e-5, "replace_one") == pytest.approx(found + other, rel=1e-9)
    ledger.set_budget(found + other + 0.01, 1e-5, "replace_one")
    assert ledger.summary()["spent"] == pytest.approx(found + other, rel=1e-9)
    with pytest.raises(BudgetExceeded):
        ledger.open_run("more", gauss, 1, delta=1e-5, neighboring_relation="replace_one")


def test_files_are_for_their_owner_only(ledger):
    ledger.reserve("a", 0, EVENT)
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(ledger.path.with_suffix(".head").stat().st_mode) == 0o600
    assert stat.S_IMODE(ledger.path.parent.stat().st_mode) == 0o700


def test_where_it_lives(monkeypatch, tmp_path):
    monkeypatch.setenv("SOTTO_LEDGER_DIR", str(tmp_path / "x"))
    assert ledger_dir() == tmp_path / "x"
    monkeypatch.delenv("SOTTO_LEDGER_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert ledger_dir() == tmp_path / "sotto" / "ledger"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert ledger_dir() == Path.home() / ".local" / "share" / "sotto" / "ledger"


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 200, "a b"])
def test_names_that_are_not_files(name, tmp_path):
    with pytest.raises(SottoError):
        Ledger.open(name, tmp_path)


def test_a_run_reserves_no_more_than_it_announced(ledger):
    for step in range(100):
        ledger.reserve("a", step, EVENT)
    with pytest.raises(BudgetExceeded) as caught:
        ledger.reserve("a", 100, EVENT)
    assert caught.value.code == "SOT415"
    assert reopen(ledger).reserved("a") == 100


def test_a_step_that_is_done_again_is_one_of_those_that_were_announced(ledger):
    for _ in range(100):
        ledger.reserve("a", 0, EVENT)
    with pytest.raises(BudgetExceeded) as caught:
        ledger.reserve("a", 0, EVENT)
    assert caught.value.code == "SOT415"


@pytest.mark.parametrize("order", [1, -1])
def test_runs_with_different_noise_add_up_as_they_are(tmp_path, order):
    """Without sampling the total is known: 7 releases at noise 4 and 3 at noise 9 are one at noise 1 / mu."""
    ledger = Ledger.open("notes", tmp_path)
    for run, noise, count in (("a", 4.0, 7), ("b", 9.0, 3))[::order]:
        ledger.open_run(run, Gaussian(noise), 10, delta=1e-5, neighboring_relation="replace_one")
        for _ in range(count):
            ledger.reserve(run, 0, Gaussian(noise))
    mu = (7 / 16 + 3 / 81) ** 0.5
    for relation, distance in (("add_or_remove_one", 1.0), ("replace_one", 2.0)):
        whole = accounting.composed_epsilon([(Gaussian(1 / (distance * mu)), 1)], 1e-5)
        assert ledger.spent(1e-5, relation) == pytest.approx(whole, rel=1e-9)
        assert reopen(ledger).spent(1e-5, relation) == pytest.approx(whole, rel=1e-9)


def test_misuse(ledger):
    ledger.open_run("a", EVENT, 100, delta=1e-5)  # resuming: the same plan again is fine
    for action in (
        lambda: ledger.open_run("a", EVENT, 101, delta=1e-5),
        lambda: ledger.open_run("a", PoissonGaussian(0.9, 0.01), 100, delta=1e-5),
        lambda: ledger.open_run("", EVENT, 100, delta=1e-5),
        lambda: ledger.reserve("b", 0, EVENT),
        lambda: ledger.reserve("a", 0, PoissonGaussian(2.0, 0.01)),
        lambda: ledger.close_run("b"),
    ):
        with pytest.raises(SottoError) as caught:
            action()
        assert caught.value.code == "SOT413"
    ledger.close_run("a")
    for action in (lambda: ledger.reserve("a", 0, EVENT), lambda: ledger.open_run("a", EVENT, 100, delta=1e-5)):
        with pytest.raises(SottoError, match="closed"):
            action()
    assert ledger.events() == []


def test_a_run_that_releases_may_end_is_charged_whole_from_its_first_step(tmp_path):
    ledger = Ledger.open("clinic", tmp_path)
    ledger.open_run("a", EVENT, 100, delta=1e-5, whole=True)
    assert ledger.events() == []
    assert ledger.outstanding() == [(EVENT, 100)]
    ledger.reserve("a", 0, EVENT)
    ledger.reserve("a", 0, EVENT)
    for seen in (ledger, reopen(ledger)):
        assert seen.reserved("a") == 2
        assert seen.charged("a") == 100
        assert seen.events() == [(EVENT, 100)]
        assert seen.outstanding() == []
        assert seen.charged("unknown") == 0
    for step in range(1, 99):
        ledger.reserve("a", step, EVENT)
    with pytest.raises(BudgetExceeded, match="SOT415"):
        ledger.reserve("a", 99, EVENT)
    ledger.close_run("a")
    assert reopen(ledger).events() == [(EVENT, 100)]
    assert reopen(ledger).spent(1e-5) == accounting.epsilon(1.0, 0.01, 100, 1e-5)


def test_what_a_whole_run_has_not_taken_is_not_free(tmp_path):
    one, ledger = accounting.epsilon(1.0, 0.01, 100, 1e-5), Ledger.open("clinic", tmp_path)
    ledger.set_budget(1.05 * one, 1e-5)
    ledger.open_run("a", EVENT, 100, delta=1e-5, whole=True)
    ledger.reserve("a", 0, EVENT)
    ledger.close_run("a")
    with pytest.raises(BudgetExceeded, match="SOT414"):
        reopen(ledger).open_run("b", EVENT, 100, delta=1e-5)


def test_a_whole_run_that_took_no_step_costs_nothing(tmp_path):
    ledger = Ledger.open("clinic", tmp_path)
    ledger.open_run("a", EVENT, 100, delta=1e-5, whole=True)
    ledger.close_run("a")
    assert reopen(ledger).events() == reopen(ledger).outstanding() == []


def test_a_run_does_not_become_whole_or_cease_to_be(ledger):
    with pytest.raises(SottoError, match="SOT413"):
        ledger.open_run("a", EVENT, 100, delta=1e-5, whole=True)
    ledger.open_run("b", EVENT, 100, delta=1e-5, whole=True)
    with pytest.raises(SottoError, match="SOT413"):
        ledger.open_run("b", EVENT, 100, delta=1e-5)


# --- budgets -------------------------------------------------------------------------------------------------------


def test_three_runs_compose_by_events_not_by_epsilons(tmp_path):
    q, steps, delta = 1024 / 41203, 121, 1e-6
    event = PoissonGaussian(accounting.noise_multiplier(4.0, q, steps, delta), q)
    ledger = Ledger.open("notes", tmp_path)
    for run in "abc":
        ledger.open_run(run, event, steps, delta=delta)
        for step in range(steps):
            ledger.reserve(run, step, event)
        ledger.close_run(run)
    assert ledger.spent(delta) == pytest.approx(5.8, abs=0.1)
    assert ledger.spent(delta) == reopen(ledger).spent(delta)
    assert ledger.summary()["runs"][2]["epsilon"] <= 4.0


def test_a_budget_holds_over_all_runs(tmp_path):
    ledger = Ledger.open("notes", tmp_path)
    assert ledger.budget() is None
    sigma = accounting.noise_multiplier(3.0, 0.02, 50, 1e-5)
    event = PoissonGaussian(sigma, 0.02)
    ledger.set_budget(3.0, 1e-5)
    assert reopen(ledger).budget() == (3.0, 1e-5)
    ledger.open_run("first", event, 50, delta=1e-5)  # exactly the budget
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetExceeded) as caught:
        reopen(ledger).open_run("second", event, 1, delta=1e-5)  # the first has reserved nothing yet
    message = str(caught.value)
    assert caught.value.code == "SOT414"
    assert caught.value.exit_code == 3
    for part in ("second", "first (50 steps)", "budget is 3", "1e-05"):
        assert part in message
    assert ledger.path.read_bytes() == before
    for step in range(10):
        ledger.reserve("first", step, event)
    ledger.open_run("first", event, 50, delta=1e-5)  # a resume is not a new run
    ledger.close_run("first")
    ledger.open_run("second", event, 40, delta=1e-5)  # what the first did not use
    with pytest.raises(BudgetExceeded):
        ledger.open_run("third", event, 1, delta=1e-5)
    summary = ledger.summary()
    assert summary["budget"] == (3.0, 1e-5)
    assert 0 < summary["spent"] < 3.0
    assert [(r["run"], r["state"], r["planned"], r["reserved"]) for r in summary["runs"]] == [
        ("first", "closed", 50, 10),
        ("second", "open", 40, 0),
    ]
    json.dumps(summary)


def test_a_budget_may_be_meant_for_replacement(tmp_path):
    ledger = Ledger.open("notes", tmp_path)
    sigma = accounting.noise_multiplier(3.0, 0.02, 50, 1e-5)
    ledger.set_budget(3.0, 1e-5, "replace_one")
    assert reopen(ledger).budget_relation == "replace_one"
    with pytest.raises(BudgetExceeded):
        ledger.open_run("a", PoissonGaussian(sigma, 0.02), 50, delta=1e-5)


# --- damage --------------------------------------------------------------------------------------------------------


def lines_of(ledger: Ledger, steps: int = 5) -> list[bytes]:
    for step in range(steps):
        ledger.reserve("a", step, EVENT)
    return ledger.path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("line", range(6))
def test_any_edit_is_found(ledger, line, head):
    lines = lines_of(ledger)
    lines[line] = lines[line].replace(b'"a"', b'"b"', 1)
    ledger.path.write_bytes(b"".join(lines))
    if not head:
        ledger.path.with_suffix(".head").unlink()
    assert f"line {line + 1}" in str(damaged(ledger))


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"step":3', b'"step":2'), (b'"steps":100', b'"steps":900'), (b'"delta":1e-05', b'"delta":1e-03')],
    ids=["step", "planned", "delta"],
)
def test_an_edit_that_makes_sense_is_found(ledger, old, new, head):
    """Not because the entry could not be read, but because it is not the one that was written."""
    text = b"".join(lines_of(ledger))
    assert text.count(old) == 1
    ledger.path.write_bytes(text.replace(old, new))
    if not head:
        ledger.path.with_suffix(".head").unlink()
    assert "was edited" in str(damaged(ledger))


@pytest.mark.parametrize("change", ["delete", "swap", "repeat", "not_json", "first"])
def test_lines_removed_moved_or_added(ledger, change):
    lines = lines_of(ledger)
    if change == "delete":
        del lines[2]
    elif change == "first":
        del lines[0]
    elif change == "swap":
        lines[2], lines[3] = lines[3], lines[2]
    elif change == "repeat":
        lines.insert(3, lines[2])
    else:
        lines[2] = b"{}garbage\n"
    ledger.path.write_bytes(b"".join(lines))
    damaged(ledger)


def test_a_ledger_of_another_dataset_is_refused(ledger):
    os.rename(ledger.path, ledger.path.with_name("other.jsonl"))
    with pytest.raises(SottoError, match="line 1"):
        Ledger.open("other", ledger.path.parent)


def test_a_cut_tail_is_found_by_the_head(ledger):
    lines = lines_of(ledger)
    ledger.path.write_bytes(b"".join(lines[:-2]))
    assert "cut off" in str(damaged(ledger))
    with pytest.raises(SottoError):  # and by whoever has it open
        ledger.reserve("a", 9, EVENT)
    ledger.path.write_bytes(b"".join(lines[:-1]) + b"{garbage\n")
    damaged(ledger)
    ledger.path.unlink()
    damaged(ledger)


def test_a_rewritten_file_is_found_by_the_head(ledger, tmp_path):
    lines_of(ledger)
    twin = Ledger.open("clinic", tmp_path / "twin")
    twin.open_run("cheap", PoissonGaussian(9.0, 0.01), 100, delta=1e-5)
    for step in range(6):
        twin.reserve("cheap", step, PoissonGaussian(9.0, 0.01))
    ledger.path.write_bytes(twin.path.read_bytes())
    assert "replaced" in str(damaged(ledger))


def test_without_a_head_a_cut_tail_goes_unseen_as_documented(ledger):
    lines = lines_of(ledger)
    ledger.path.write_bytes(b"".join(lines[:-2]))
    ledger.path.with_suffix(".head").write_bytes(b"noise")
    assert reopen(ledger).reserved("a") == 3


@pytest.mark.parametrize("keep", [1, 40, -2, -1])
def test_a_torn_last_line_is_set_aside(ledger, keep):
    lines = lines_of(ledger)
    ledger.path.with_suffix(".head").unlink()  # as the crash left it: written after the line
    ledger.path.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    again = reopen(ledger)
    assert again.reserved("a") == 4
    assert ledger.path.with_suffix(".torn").read_bytes().startswith(lines[-1][:keep])
    again.reserve("a", 4, EVENT)
    assert reopen(again).reserved("a") == 5


@pytest.mark.parametrize("tail", [b"\x00" * 300, b"\x00" * 300 + b"\n", b"\xff\xfe{", b"[1, 2]\n"])
def test_zeros_and_garbage_at_the_end_are_set_aside(ledger, tail):
    lines_of(ledger)
    with open(ledger.path, "ab") as file:
        file.write(tail)
    ledger.reserve("a", 5, EVENT)  # also by a process that has it open
    assert reopen(ledger).reserved("a") == 6


def test_a_torn_line_is_not_cut_off_where_it_cannot_be_set_aside(ledger):
    lines_of(ledger)
    with open(ledger.path, "ab") as file:
        file.write(b'{"seq"')
    before = ledger.path.read_bytes()
    aside = ledger.path.with_suffix(".torn")
    aside.mkdir()
    with pytest.raises(SottoError) as caught:
        reopen(ledger)
    assert caught.value.code == "SOT412"
    assert ledger.path.read_bytes() == before
    aside.rmdir()
    assert reopen(ledger).reserved("a") == 5
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600


def test_a_ledger_that_cannot_be_looked_for(monkeypatch):
    def denied(self, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(SottoError, match=r"SOT410.*Permission denied"):
        Ledger.exists("clinic")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SOTTO_LEDGER_DIR")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(SottoError, match=r"(?s)SOT410.*set SOTTO_LEDGER_DIR"):
        ledger_dir()
    assert diagnosis._ledger()[1] is False


def test_an_entry_of_a_newer_version_is_refused(ledger):
    with ledger._chain.locked() as file, pytest.raises(SottoError):
        ledger._chain.append(file, kind="tune", run="a")
    assert "line 2" in str(damaged(ledger))


def test_a_ledger_that_vanished_is_an_error(ledger):
    ledger.reserve("a", 0, EVENT)
    ledger.path.unlink()
    with pytest.raises(SottoError) as caught:
        ledger.reserve("a", 1, EVENT)
    assert caught.value.code == "SOT410"
    assert not ledger.path.exists()


# --- disks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["pwrite", "short", "fsync"])
def test_a_full_disk_charges_nothing_and_leaves_nothing(ledger, monkeypatch, failing):
    ledger.reserve("a", 0, EVENT)
    before = ledger.path.read_bytes()
    genuine = os.pwrite
    full = OSError(28, "No space left on device")

    def fail(*_):
        raise full

    def short(descriptor, data, offset):
        if len(data) < 100:
            raise full
        return genuine(descriptor, data[:150], offset)

    with monkeypatch.context() as patch:
        patch.setattr(chain.os, "fsync" if failing == "fsync" else "pwrite", short if failing == "short" else fail)
        with pytest.raises(SottoError, match="No space left") as caught:
            ledger.reserve("a", 1, EVENT)
    assert caught.value.code == "SOT412"
    assert caught.value.fix
    assert ledger.path.read_bytes() == before
    assert ledger.reserved("a") == reopen(ledger).reserved("a") == 1
    ledger.reserve("a", 1, EVENT)
    assert reopen(ledger).reserved("a") == 2


def _limited(path: str, size: int, result) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    ledger = Ledger.open("clinic", path)
    try:
        for step in range(100):
            ledger.reserve("a", step, EVENT)
    except SottoError as error:
        result.put((error.code, ledger.reserved("a")))


def test_a_file_size_limit(ledger):
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_limited, args=(str(ledger.path.parent), 3000, result))
    process.start()
    code, reserved = result.get(timeout=60)
    process.join(60)
    assert code == "SOT412"
    assert 0 < reserved < 15
    assert reopen(ledger).reserved("a") == reserved


def test_the_charge_is_on_the_disk_before_reserve_returns(ledger, monkeypatch):
    seen = []
    monkeypatch.setattr(chain.os, "fsync", lambda descriptor: seen.append(os.fstat(descriptor).st_size))
    ledger.reserve("a", 0, EVENT)
    assert seen == [ledger.path.stat().st_size]
    seen.clear()
    Ledger.open("new", ledger.path.parent)
    assert len(seen) == 1  # the folder


# --- several processes, and kills ----------------------------------------------------------------------------------


def _reserve_many(path: str, run: str, count: int) -> None:
    ledger = Ledger.open("clinic", path)
    ledger.open_run(run, EVENT, count, delta=1e-5)
    for step in range(count):
        ledger.reserve(run, step, EVENT)


def test_several_processes_share_one_ledger(ledger):
    context = multiprocessing.get_context("spawn")
    arguments = [(str(ledger.path.parent), f"run{i}", 60) for i in range(3)]
    processes = [context.Process(target=_reserve_many, args=a) for a in arguments]
    for process in processes:
        process.start()
    for step in range(60):
        ledger.reserve("a", step, EVENT)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    ledger.refresh()
    for seen in (ledger, reopen(ledger)):
        assert [seen.reserved(run) for run in ("a", "run0", "run1", "run2")] == [60] * 4
        assert seen.events() == [(EVENT, 240)]


def test_a_fork_may_use_the_ledger_of_its_parent(ledger):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for step in range(20):
                ledger.reserve("a", step, EVENT)
            status = 0
        finally:
            os._exit(status)
    for step in range(20):
        ledger.reserve("a", step, EVENT)
    assert os.waitpid(child, 0)[1] == 0
    assert reopen(ledger).reserved("a") == 40


KILLED = """
import sys
from sotto.privacy.accounting import PoissonGaussian
from sotto.privacy.ledger import Ledger
event = PoissonGaussian(1.0, 0.01)
ledger = Ledger.open("clinic", sys.argv[1])
ledger.open_run("a", event, 1_000_000, delta=1e-5)
for step in range(1_000_000):
    ledger.reserve("a", step, event)
    sys.stdout.buffer.write(b".")   # the step touches data
    sys.stdout.buffer.flush()
"""


def test_kill_minus_nine_never_under_counts(tmp_path):
    stepped = 0
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        stepped += len(process.stdout.read(1))
        time.sleep(0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        stepped += len(process.stdout.read())
        process.wait()
        process.stdout.close()
        reserved = Ledger.open("clinic", tmp_path).reserved("a")
        assert stepped <= reserved <= stepped + attempt + 1
    assert stepped > 6


def test_speed(tmp_path, monkeypatch):
    """O(1) per append, and a second or so to open a long ledger. Without fsync, whose cost is the disk's."""
    monkeypatch.setattr(chain.os, "fsync", lambda descriptor: None)
    ledger = Ledger.open("clinic", tmp_path)
    ledger.open_run("a", EVENT, 100_000, delta=1e-5)

    def best_of(rounds: int, count: int) -> float:
        times = []
        for _ in range(rounds):
            start = time.process_time()
            for _ in range(count):
                ledger.reserve("a", ledger.reserved("a"), EVENT)
            times.append(time.process_time() - start)
        return min(times) / count

    early = best_of(3, 500)
    for _ in range(10_000):
        ledger.reserve("a", ledger.reserved("a"), EVENT)
    late = best_of(3, 500)
    assert late < 3 * early + 1e-4
    assert late < 2e-3
    start = time.process_time()
    assert reopen(ledger).reserved("a") == 13_000
    assert time.process_time() - start < 1.0

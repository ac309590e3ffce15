"""Files of a run that are flipped, cut or lost: the right result or a documented error, and never a lower epsilon."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

import sotto
from sotto import commands
from sotto import session as sessions
from sotto.errors import SottoError
from sotto.privacy.ledger import Ledger

STEPS = 4
HERE = Path(__file__).parent
CODES = set(re.findall(r"^\| (SOT\d{3}) \|", (HERE.parent / "docs" / "errors.md").read_text(), re.MULTILINE))


class Whole:
    """A run at rest, with its ledger, to be copied, damaged and looked at again and again."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, finish: bool, **changes: Any):
        self.folder = folder
        patch.setenv("SOTTO_LEDGER_DIR", str(folder / "ledger"))
        session = sessions.start(tiny_runs.config(folder, **changes), "x")

        def stop(done: int, values: dict[str, Any]) -> None:
            session.stop_requested = done >= STEPS - 2 and not finish

        assert commands.run_session(session, stop).finished is finish
        self.run = session.run.path
        self.kept = folder.with_name(folder.name + "-kept")
        shutil.copytree(folder, self.kept)

    def fresh(self) -> None:
        for name in ("runs", "ledger"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            if (self.kept / name).exists():
                shutil.copytree(self.kept / name, self.folder / name)

    def files(self) -> list[Path]:
        found = [p for name in ("runs", "ledger") for p in (self.kept / name).rglob("*") if p.is_file()]
        return sorted(self.folder / p.relative_to(self.kept) for p in found if p.stat().st_size)

    def charged(self) -> int:
        return Ledger.open(json.loads((self.run / "private" / "secrets.json").read_text())["ledger"]).reserved(
            self.run.name
        )


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Whole:
    (tmp_path / "at").mkdir()
    return Whole(tmp_path / "at", monkeypatch, False, run={"steps": STEPS, "spare_steps": 40})


@pytest.fixture
def debug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Whole:
    (tmp_path / "at").mkdir()
    return Whole(tmp_path / "at", monkeypatch, False, run={"steps": STEPS, "debug_noise_seed": 5})


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Whole:
    (tmp_path / "at").mkdir()
    return Whole(tmp_path / "at", monkeypatch, True, run={"steps": STEPS, "spare_steps": 40})


def damage(path: Path, generator: random.Random) -> str:
    """Flips a bit, overwrites a few bytes, cuts the file, or empties it."""
    content, how = (
        bytearray(path.read_bytes()),
        generator.choice(["flip", "flip", "digit", "overwrite", "cut", "empty"]),
    )
    place = generator.randrange(len(content))
    digits = [i for i, byte in enumerate(content) if chr(byte) in "0123456789"]
    if how == "digit" and digits:  # what still reads like a file is the worst case
        place = generator.choice(digits)
        content[place] = ord(generator.choice("0123456789"))
    elif how in ("flip", "digit"):
        content[place] ^= 1 << generator.randrange(8)
    elif how == "overwrite":
        content[place : place + 8] = generator.randbytes(8)
    else:
        del content[0 if how == "empty" else place :]
    path.write_bytes(content)
    return f"{path.name}: {how} at {place}"


def attempt(action: Any) -> Any:
    """The result, or None where it was refused with a documented error."""
    try:
        return action()
    except SottoError as error:
        refused = error
    assert refused.code in CODES, refused
    assert refused.what
    assert refused.fix
    return None


def rounds(per_file: int, whole: Whole) -> Any:
    generator = random.Random(7)
    for path in whole.files():
        for _ in range(per_file):
            whole.fresh()
            yield path, damage(path, generator)


def resume_damaged(whole: Whole, per_file: int) -> None:
    for path, how in rounds(per_file, whole):
        done = attempt(lambda: sotto.resume(whole.run))
        attempt(lambda: sotto.ls(whole.folder / "runs"))
        attempt(lambda: sotto.show(whole.run))
        if done is None:
            continue
        plan = sotto.Config.load(whole.run / "config.yaml")
        released = len((whole.run / "metrics.public.jsonl").read_bytes().splitlines())
        facts = json.loads((whole.run / "privacy.json").read_text())
        if path.name != "metrics.public.jsonl":
            assert facts["steps_charged"] >= released >= STEPS, how
        assert facts["steps_charged"] >= STEPS, how
        assert whole.charged() >= facts["steps_charged"], how
        assert facts["delta"] == plan.privacy.delta, how
        recomputed = sotto.plan(plan).epsilon_after(facts["steps_charged"])
        assert facts["epsilon"] >= recomputed - 1e-6, how


def test_a_private_run_is_resumed_after_damage(unfinished: Whole) -> None:
    resume_damaged(unfinished, 1)


@pytest.mark.slow
def test_a_private_run_is_resumed_after_much_damage(unfinished: Whole) -> None:
    resume_damaged(unfinished, 25)


def resume_debug(whole: Whole, per_file: int) -> None:
    done = sotto.resume(whole.run)
    expected = tiny_runs.final_weights(done.path)
    for _, how in rounds(per_file, whole):
        if attempt(lambda: sotto.resume(whole.run)) is not None:
            found = tiny_runs.final_weights(whole.run)
            assert all(torch.equal(found[name], expected[name]) for name in expected), how


def test_weights_after_damage_are_the_same_bits(debug: Whole) -> None:
    resume_debug(debug, 1)


@pytest.mark.slow
def test_weights_after_much_damage_are_the_same_bits(debug: Whole) -> None:
    resume_debug(debug, 25)


def read_damaged(whole: Whole, per_file: int) -> None:
    done = sotto.resume(whole.run)
    expected = {name: value.clone() for name, value in done.model.state_dict().items()}
    listed = sotto.ls(whole.folder / "runs")[0]
    to = whole.folder / "out"
    for path, how in rounds(per_file, whole):
        again = attempt(lambda: sotto.resume(whole.run))
        if again is not None:
            assert (again.statement, again.epsilon) == (done.statement, done.epsilon), how
            assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items()), how
        assert attempt(lambda: sotto.show(whole.run)) in (None, done.statement), how
        now = sotto.ls(whole.folder / "runs")
        assert now[0]["epsilon"] in (listed["epsilon"], None), how
        if attempt(lambda: sotto.export(whole.run, to)) is not None:
            facts = json.loads((to / "privacy.json").read_text())
            assert facts["epsilon"] == done.epsilon or path.parent.name == "model", how
        shutil.rmtree(to, ignore_errors=True)


def test_a_finished_run_is_read_after_damage(finished: Whole) -> None:
    read_damaged(finished, 1)


@pytest.mark.slow
def test_a_finished_run_is_read_after_much_damage(finished: Whole) -> None:
    read_damaged(finished, 25)


# ---- what would have been counted too low


def test_a_renamed_folder_is_refused(unfinished: Whole) -> None:
    """Under another name the ledger would count the run from nothing, and the statement with it."""
    other = unfinished.run.rename(unfinished.run.with_name("renamed"))
    with pytest.raises(SottoError) as caught:
        sotto.resume(other)
    assert caught.value.code == "SOT517"
    link = other.with_name("latest")
    other.rename(unfinished.run)
    link.symlink_to(unfinished.run.name)
    assert sotto.resume(link).finished
    unfinished.run.rename(other)
    assert sotto.resume(other).finished, "a finished run may have any name"


def test_another_ledger_is_refused(unfinished: Whole, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The steps that were taken would stand in no ledger that anyone looks at."""
    with monkeypatch.context() as patch:
        patch.setenv("SOTTO_LEDGER_DIR", str(tmp_path / "another"))
        for keep in ("checkpoints", ""):  # known from the checkpoint, and from what was logged
            if not keep:
                shutil.rmtree(unfinished.run / "checkpoints")
                (unfinished.run / "checkpoints").mkdir()
            with pytest.raises(SottoError) as caught:
                sotto.resume(unfinished.run)
            assert caught.value.code == "SOT416"
    unfinished.fresh()
    assert sotto.resume(unfinished.run).finished


def test_a_name_of_another_ledger_is_refused(unfinished: Whole) -> None:
    path = unfinished.run / "private" / "secrets.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ledger": "another"}))
    with pytest.raises(SottoError) as caught:
        sotto.resume(unfinished.run)
    assert caught.value.code == "SOT516"


def test_an_epsilon_that_was_lowered_is_not_repeated(finished: Whole) -> None:
    path = finished.run / "privacy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epsilon": 0.1}))
    for action in (sotto.resume, lambda run: sotto.export(run, finished.folder / "out")):
        with pytest.raises(SottoError) as caught:
            action(finished.run)
        assert caught.value.code == "SOT516"
    assert sotto.ls(finished.folder / "runs")[0]["state"] == "damaged"
    assert sotto.ls(finished.folder / "runs")[0]["epsilon"] is None


def test_a_key_that_the_result_depends_on_may_not_change(unfinished: Whole) -> None:
    path = unfinished.run / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    with pytest.raises(SottoError) as caught:
        sotto.resume(unfinished.run)
    assert caught.value.code == "SOT514"
    path.write_text(text.replace("microbatch_size: 8", "microbatch_size: 4"))
    assert sotto.resume(unfinished.run).finished


def test_an_older_checkpoint_does_not_pass_for_the_last(finished: Whole) -> None:
    last = sorted((finished.run / "checkpoints").iterdir())[-1]
    (last / "state.json").unlink()
    with pytest.raises(SottoError) as caught:
        sotto.export(finished.run, finished.folder / "out")
    assert caught.value.code == "SOT512"


def test_a_clock_that_jumps_back_changes_nothing(unfinished: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    from sotto.privacy import chain

    class Yesteryear(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz).replace(year=1999)

    monkeypatch.setattr(chain, "datetime", Yesteryear)
    monkeypatch.setattr("time.time", lambda: 0.0)
    done = sotto.resume(unfinished.run)
    assert done.finished
    facts = json.loads((unfinished.run / "privacy.json").read_text())
    assert facts["steps_charged"] == unfinished.charged() == STEPS
    assert b'"time":"1999' in next((unfinished.folder / "ledger").glob("*.jsonl")).read_bytes()

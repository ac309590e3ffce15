"""The folder of a run: whole or not at all, atomic files, one process."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import tiny_runs

from sotto.config import Config
from sotto.errors import SottoError
from sotto.rundir import RunDir, find_run, require_writable


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_runs.config(tmp_path)


def create(config: Config) -> RunDir:
    run = RunDir.planned(config, "clinic")
    run.create(config, {"steps": 1}, {"secrets.json": "{}"})
    return run


def test_a_new_folder(config: Config) -> None:
    run = create(config)
    assert run.config() == config
    assert run.read_json("plan.json") == {"steps": 1}
    assert not run.finished
    assert RunDir.open(run.path) == run
    assert [path.name for path in run.path.parent.iterdir()] == [run.id]
    assert stat.S_IMODE((run.path / "private").stat().st_mode) == 0o700
    assert stat.S_IMODE((run.path / "private" / "secrets.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("stem", ["../../etc/x", "a b", "", "...", "ü", "x" * 300])
def test_names_are_safe_and_never_the_same(config: Config, stem: str) -> None:
    first, second = RunDir.planned(config, stem), RunDir.planned(config, stem)
    assert first.path.parent == Path(config.output.dir)
    assert first.path != second.path
    assert first.id.isascii()
    assert len(first.id) < 120
    assert not first.path.exists()


def test_a_failure_leaves_nothing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SottoError, match="No space left") as caught:
        create(config)
    assert caught.value.code == "SOT503"
    assert not Path(config.output.dir).exists()


def test_files_are_replaced_in_one_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(config)
    run.write("x.txt", "old")
    run.write("x.txt", "new")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(OSError, match="I/O"):
        run.write("x.txt", "newest")
    assert (run.path / "x.txt").read_text() == "new"
    assert [path.name for path in run.path.glob(".*")] == []


def test_a_vendors_folder_is_through_with_its_last_step(config: Config) -> None:
    run = create(config)
    assert run.split_progress(10) == (False, 0)
    for name in ("step-00000009", "step-00000008", ".writing-00000010-1", "step-later"):
        (run.checkpoints / name).mkdir()
    assert run.split_progress(10) == (False, 9)
    (run.checkpoints / "step-00000010").mkdir()
    assert run.split_progress(10) == (True, 10)
    (run.path / "private" / "outbox").mkdir()
    assert run.split_progress(10) == (False, 10), "a customer's, or both sides', is through with the statement"
    run.write("privacy.json", "{}")
    assert run.split_progress(10) == (True, 10)


def test_one_process_at_a_time(config: Config) -> None:
    run = create(config)
    with run.locked(), pytest.raises(SottoError) as caught, run.locked():
        pass
    assert caught.value.code == "SOT502"
    with run.locked():
        pass


@pytest.mark.parametrize("missing", ["config.yaml", "plan.json", "private/secrets.json", "private/seal.json"])
def test_a_folder_that_lacks_something_is_not_a_run(config: Config, missing: str) -> None:
    run = create(config)
    (run.path / missing).unlink()
    with pytest.raises(SottoError, match=missing.replace(".", r"\.")) as caught:
        RunDir.open(run.path)
    assert caught.value.code == "SOT501"


def test_a_file_is_no_run_and_no_folder_is_suggested_for_it(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("")
    (tmp_path / "clinic_1").mkdir()
    with pytest.raises(SottoError, match="SOT501  this is a file"):
        find_run(tmp_path / "notes.csv")
    with pytest.raises(SottoError, match="Did you mean 'clinic_1'"):
        find_run(tmp_path / "clinic_2")
    with pytest.raises(SottoError, match=r"no such folder\.\n"):
        find_run(tmp_path / "notes.csw")


def test_writability_is_asked_before_anything_is_read(config: Config, tmp_path: Path) -> None:
    require_writable(config)
    assert not Path(config.output.dir).exists()
    (tmp_path / "runs").write_text(json.dumps("a file"))
    for place in ("", "/deeper", "/deeper/still"):
        blocked = config.with_overrides([f"output.dir={tmp_path}/runs{place}"])
        with pytest.raises(SottoError, match="not a folder"):
            require_writable(blocked)

"""Checkpoints: whole or absent, two kept, and damage noticed."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from sotto import checkpoint
from sotto.checkpoint import Checkpoint


def state(step: int) -> Checkpoint:
    weights = {"a.weight": torch.full((3, 2), float(step)), "b": torch.tensor(step, dtype=torch.bfloat16)}
    return Checkpoint(step, weights, {"exp_avg/a.weight": torch.ones(2, 3).T * step}, {"microbatch_size": 7})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_is(found: Checkpoint | None, step: int) -> None:
    assert found is not None
    expected = state(step)
    assert (found.step, found.extra) == (step, {"microbatch_size": 7})
    for have, want in ((found.weights, expected.weights), (found.optimizer, expected.optimizer)):
        assert have.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(have[name], value)
            assert have[name].dtype == value.dtype


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(3))
    assert names(tmp_path) == ["step-00000003"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    found, damaged = checkpoint.load_latest(tmp_path)
    assert_is(found, 3)
    assert damaged == []


def test_nothing_to_load(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path) == (None, [])
    assert checkpoint.load_latest(tmp_path / "absent") == (None, [])


def test_an_optimizer_without_state_can_be_saved(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, Checkpoint(1, {"a": torch.ones(1)}, {}, {}))
    found, _ = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found.optimizer == {}


def test_two_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, state(step))
    assert names(tmp_path) == ["step-00000010", "step-00000011"]
    assert_is(checkpoint.load_latest(tmp_path)[0], 11)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(4))
    (path / "weights.safetensors").write_bytes(b"damaged")
    checkpoint.save(tmp_path, state(4))
    assert_is(checkpoint.load_latest(tmp_path)[0], 4)


def test_damaged_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """Both later checkpoints are damaged; the run goes on from an earlier one, and what it saves must stay."""
    for step in (5, 9, 10):
        path = checkpoint.save(tmp_path, state(step))
        if step > 5:
            (path / "state.json").write_text("{}")
    assert checkpoint.load_latest(tmp_path)[0] is None, "two are kept, and both are damaged"
    checkpoint.save(tmp_path, state(2))
    assert names(tmp_path) == ["step-00000002"]
    assert_is(checkpoint.load_latest(tmp_path)[0], 2)


def test_litter_of_a_crash_is_cleared_and_never_loaded(tmp_path: Path) -> None:
    (tmp_path / ".writing-00000009-1").mkdir()
    assert checkpoint.load_latest(tmp_path) == (None, [])
    checkpoint.save(tmp_path, state(1))
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "last", "truncate", "empty", "remove"])
def test_damage_is_noticed(tmp_path: Path, file: str, damage: str) -> None:
    checkpoint.save(tmp_path, state(1))
    path = checkpoint.save(tmp_path, state(2)) / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "last":  # of a tensor's numbers, where no header shows it
        content[-1] ^= 4
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    found, damaged = checkpoint.load_latest(tmp_path)
    assert_is(found, 1)
    assert damaged == ["step-00000002"]


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"sha256": 1}', '{"sha256": {}}'])
def test_a_manifest_of_another_shape(tmp_path: Path, content: str) -> None:
    path = checkpoint.save(tmp_path, state(1))
    (path / "manifest.json").write_text(content)
    assert checkpoint.load_latest(tmp_path) == (None, ["step-00000001"])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), safetensors.SafetensorError("I/O error: full")])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    checkpoint.save(tmp_path, state(1))

    def save_file(*args: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match="full"):
        checkpoint.save(tmp_path, state(2))
    assert names(tmp_path) == ["step-00000001"]
    assert_is(checkpoint.load_latest(tmp_path)[0], 1)


def test_ctrl_c_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, state(1))
    monkeypatch.setattr(checkpoint, "_fsync", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, state(2))
    assert names(tmp_path) == ["step-00000001"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, rename = checkpoint._fsync, Path.rename
    monkeypatch.setattr(checkpoint, "_fsync", lambda path: (order.append(path.name), fsync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, target: (order.append("RENAME"), rename(self, target))[1])
    checkpoint.save(tmp_path, state(1))
    before, after = order[: order.index("RENAME")], order[order.index("RENAME") + 1 :]
    assert {"weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"} < set(before)
    assert before[-1].startswith(".writing")
    assert after == [tmp_path.name]

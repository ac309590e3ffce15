"""Checkpoints that are whole or absent.

A checkpoint is written to a temporary folder, every file is fsynced, a manifest with the sha256 of each is added, and
the folder is renamed into place. Loading verifies the manifest and falls back to the previous checkpoint when a file is
damaged. Two are kept. Tensors are safetensors; there is no pickle. One process at a time works on a folder (the lock
of the run sees to that).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

KEEP = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` finished steps."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    extra: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `folder/step-<n>` atomically and removes all but it and the one before.

    Later ones are removed as well: the run goes on from here, so they were passed over because they are damaged.

    Raises:
      OSError: disk full, read-only; the earlier checkpoints are untouched and the temporary folder is removed.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".writing-{checkpoint.step:08d}-{os.getpid()}"
    for left_by_a_crash in folder.glob(".writing-*"):
        shutil.rmtree(left_by_a_crash, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    try:
        _save_tensors(temporary / "weights.safetensors", checkpoint.weights)
        _save_tensors(temporary / "optimizer.safetensors", checkpoint.optimizer)
        (temporary / "state.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.extra}))
        sums = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=2))
        for file in temporary.iterdir():
            _fsync(file)
        _fsync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _fsync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, safetensors.SafetensorError):
            raise OSError(str(error)) from error
        raise
    names = [path.name for path in _newest_first(folder) if path.name <= final.name][:KEEP]
    for old in _newest_first(folder):
        if old.name not in names:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest whole checkpoint, or None, and the names of damaged ones that were passed over."""
    damaged = []
    for path in _newest_first(folder):
        try:
            return _load(path), damaged
        except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError):
            damaged.append(path.name)
    return None, damaged


def _load(path: Path) -> Checkpoint:
    sums = json.loads((path / MANIFEST).read_text())["sha256"]
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        if sums[name] != _digest(path / name):
            raise ValueError(f"{name} does not match its sha256")
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(
        step=state.pop("step"),
        weights=load_file(path / "weights.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        extra=state,
    )


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

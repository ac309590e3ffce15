"""The activation cache in a run (`method.side_cache`): filled before the first step, read in each, deleted at the end.

Filling it is one forward pass over all training data, so it pays from the second epoch on. A kill costs what was not on
disk yet: `resume` computes the rest.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sotto.losses import to_device
from sotto.models import activation_cache
from sotto.models.activation_cache import ActivationCache
from sotto.rundir import RunDir

if TYPE_CHECKING:
    from sotto.training import Holder, Session


def folder(run: RunDir) -> Path:
    return run.path / "private" / "activations"


def fill(session: Session, autocast: AbstractContextManager[Any]) -> ActivationCache:
    """Opens the run's cache, computes what it lacks, and returns it.

    Raises:
      SottoError: SOT350, there is no room for it.
    """
    s = session
    model: Any = s.model
    made_for = activation_cache.fingerprint(model, s.run.read_json("private/secrets.json")["data"])
    pad = s.tokenizer.pad_token_id

    def batch_of(rows: list[int]) -> dict[str, torch.Tensor]:
        batch = to_device(s.data.examples.collate(np.asarray(rows), pad), s.device)
        return {name: value for name, value in batch.items() if name != "labels"}

    lengths, kept, width = s.data.examples.lengths.tolist(), model.side.kept, model.stack.width
    cache = ActivationCache.open(folder(s.run), lengths, kept, width, made_for)
    with autocast, s.engine.paused():
        activation_cache.fill(cache, model, batch_of, s.microbatch_size)
    return cache


def instead_of_layers(session: Holder, examples: np.ndarray) -> AbstractContextManager[Any]:
    """Inside, stored outputs of these examples stand in for the frozen model's layers, if the run has stored them."""
    if session.activations is None:
        return nullcontext()
    return session.model.fed(session.activations.read(examples.tolist(), session.device))  # type: ignore[operator]


def delete(run: RunDir) -> None:
    """Deletes what a finished run has stored."""
    if folder(run).is_dir():
        activation_cache.wipe(folder(run))

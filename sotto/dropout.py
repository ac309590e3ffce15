"""Dropout masks of a run: independent for every example, and known to nobody.

Guarantee. Which mask an example gets depends on its place in a batch, and its place on who else was drawn. Were the
masks a function of public things (a seed of the configuration), one unit more would move everybody to other masks, and
the sum by far more than `clip_norm`. So each step, in each process, has masks from a fresh seed of the operating
system. Then the masks of an example are independent of all others and have one law wherever it stands; two runs on
neighbouring datasets can be given the same masks for every unit that both have, and what is left between their sums is
the contribution of one unit. Dropping that is decided once for a whole batch (LayerDrop) has no such law, because who
shares a microbatch depends on who was drawn; it is switched off when a model is built (`models.load`).

Masks are used and forgotten. A step that is done again has others, as it has other noise.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sotto.config import Config


@contextmanager
def masks(config: Config, device: torch.device, *where: object) -> Iterator[None]:
    """Inside, torch draws from a stream of its own; the global one is left alone.

    Args:
      device: where the model runs.
      where: the step, and whose share of it. Used with `run.debug_noise_seed` alone, so that runs can be compared.
    """
    if not config.method.dropout:
        yield
        return
    debug = config.run.debug_noise_seed
    fresh = (
        secrets.token_bytes(8) if debug is None else hashlib.sha256(f"dropout/{debug}/{where}".encode()).digest()[:8]
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(fresh, "little"))
        yield

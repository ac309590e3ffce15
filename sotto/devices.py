"""Which device a process computes on."""

from __future__ import annotations

import os

import torch

from sotto.config import Config
from sotto.errors import SottoError


def several() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SottoError(
            "SOT506", what="there is no CUDA device", where="run.device: cuda",
            why="torch sees none on this machine", fix="use run.device: auto, or install a CUDA build of torch",
        )  # fmt: skip
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def device_of(config: Config) -> torch.device:
    """The device of this process: with CUDA each process of a machine has one of its own.

    Raises:
      SottoError: SOT506, there is none for it.
    """
    device = choose_device(config.run.device)
    if device.type != "cuda" or not several():
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise SottoError(
            "SOT506", what=f"process {local} of this machine has no CUDA device of its own", where="torchrun",
            why=f"there are {torch.cuda.device_count()}, and two processes on one would only wait for each other",
            fix=f"torchrun --nproc-per-node {torch.cuda.device_count()}, or --set run.device=cpu",
        )  # fmt: skip
    torch.cuda.set_device(local)
    return torch.device("cuda", local)

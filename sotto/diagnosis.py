"""`sotto doctor`: what this machine offers, and what could go wrong on it."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

from sotto.errors import SottoError

HOSTS = "huggingface.co and its file hosts, and only to fetch a model or dataset that is named by a Hub name"


def examine() -> list[tuple[str, bool, str]]:
    """(check, passed, detail) for each thing that a run depends on."""
    return [
        ("python", sys.version_info >= (3, 11), sys.version.split()[0]),
        *_libraries(),
        _devices(),
        _compiler(),
        _memory(),
        _noise(),
        _ledger(),
        _network(),
    ]


def _libraries() -> list[tuple[str, bool, str]]:
    found = []
    for name in ("torch", "transformers", "peft", "datasets", "dp-accounting", "randomgen"):
        try:
            found.append((name, True, version(name)))
        except PackageNotFoundError:
            found.append((name, False, "not installed: pip install sotto"))
    return found


def _devices() -> tuple[str, bool, str]:
    import torch

    if not torch.cuda.is_available():
        return "device", True, f"CPU, {torch.get_num_threads()} threads (no CUDA device)"
    return "device", True, ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _compiler() -> tuple[str, bool, str]:
    from sotto.zeroth_order import compiled

    slower = "none that works, or SOTTO_COMPILE is 0: zeroth order moves large weights by numpy, which takes longer"
    return (
        "compiler",
        True,
        slower if None in map(compiled.loop, (False, True)) else "zeroth order moves large weights by a compiled loop",
    )


def _memory() -> tuple[str, bool, str]:
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    detail = f"{memory.available / 2**30:.1f} GiB of memory free, {disk.free / 2**30:.1f} GiB of disk free here"
    return "room", disk.free > 2**30, detail


def _noise() -> tuple[str, bool, str]:
    import torch

    from sotto.privacy.noise import SecureNoise

    sample = SecureNoise().normal((100_000,), 1.0, step=0, name="doctor", device=torch.device("cpu"))
    deviation = float(sample.std())
    return "noise", abs(deviation - 1) < 0.02, f"cryptographic generator, standard deviation {deviation:.3f} of 1"


def _ledger() -> tuple[str, bool, str]:
    from sotto.privacy.ledger import ledger_dir

    try:
        folder = ledger_dir()
    except SottoError as error:
        return "ledger", False, f"{error.what}: {error.fix}"
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    writable = os.access(existing, os.W_OK)
    return "ledger", writable, f"{folder}" if writable else f"{folder} cannot be written: set SOTTO_LEDGER_DIR"


def _network() -> tuple[str, bool, str]:
    offline = os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "ON", "on")
    cache = os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface"))  # Path's fails without a home
    return "network", True, f"none (HF_HUB_OFFLINE is set); cache {cache}" if offline else f"{HOSTS}; cache {cache}"

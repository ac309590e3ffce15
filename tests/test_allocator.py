"""Freed memory stays with the process, and what the environment says goes first."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from sotto import cli

PASSES = """
import resource
import statistics
import torch
from sotto.allocator import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory()

def like_a_pass():
    layers = [torch.ones(1 << 21) for _ in range(4)]  # 8 MiB each, below where glibc gives back at once
    del layers

faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    like_a_pass()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, statistics.median(faults[2:]))  # where the heap has a hole of another size, one pass may take new memory
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def pages(**environment: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", PASSES], env=clean | environment, text=True, capture_output=True,
                          check=True)  # fmt: skip
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_memory_that_was_freed_does_not_come_again_page_by_page():
    kept, faults = pages()
    assert kept
    assert faults < 100


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_the_environment_goes_first(name: str):
    """As a benchmark of memory wants it. The passes above then ask for their pages again, so that test can fail."""
    kept, faults = pages(**{"MALLOC_MMAP_THRESHOLD_": "65536", name: "65536"})
    assert not kept
    assert faults > 5_000


def test_so_do_tunables():
    assert not pages(GLIBC_TUNABLES="glibc.malloc.tcache_count=1")[0]


def test_every_command_begins_with_it(monkeypatch: pytest.MonkeyPatch):
    called: list[bool] = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(sys, "argv", ["sotto", "ls", "nowhere-at-all"])
    cli.main()
    assert called

"""The kernels that move weights on a GPU, in Triton's interpreter; and what happens where they cannot be had.

On a GPU they are tested in test_gpu.py, where everything that uses them is.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sotto.zeroth_order import kernels, walsh
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.law import Law
from sotto.zeroth_order.small import LARGEST, Room, groups

IN_THE_INTERPRETER = """
import torch
from sotto.zeroth_order import kernel, kernels
device = torch.device("cpu")
assert kernels.agree(kernel, device)
kernel.BLOCKS = 1  # other programs, the same numbers
assert kernels.agree(kernel, device)
right = kernel.signed
kernel.signed = lambda number, bits: right(number ^ 1, bits)  # other words
assert not kernels.agree(kernel, device)
kernel.signed = right
constants = kernel._constants
kernel._constants = lambda stream: {**constants(stream), "SIZES": 0}  # signs for every law
assert not kernels.agree(kernel, device)
kernel._constants = lambda stream: {**constants(stream), "WALSH": False}  # no matrix
assert not kernels.agree(kernel, device)
print("agreed")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch's CUDA builds")
def test_kernels_give_the_bits_of_the_processor():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", IN_THE_INTERPRETER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "agreed\n"


def test_the_processor_needs_no_kernel():
    made = Directions("0" * 32, {"w": torch.Size((5, 7))}, 2, Law("rademacher"))
    stream, w = made.stream("w", 0, 0), torch.zeros(5, 7)
    assert stream is not None
    assert not kernels.add(stream, 1.0, w.view(-1), 0, w.view(-1))
    assert not w.any()
    assert kernels.add_rows(stream, 1.0, w, torch.tensor([0])) is None
    assert kernels.entries(stream, 0, 5, torch.device("cpu")) is None


def test_a_forecast_holds_the_small_tensors_that_are_moved_together(monkeypatch):
    monkeypatch.setattr(kernels, "_installed", lambda: "kernels that nobody runs")
    made = Directions("0" * 32, {"w": torch.Size((5, 7)), "v": torch.Size((LARGEST + 1,))}, 2, Law("rademacher"))
    meta = {name: torch.empty(shape, device="meta") for name, shape in made.shapes.items()}
    fake = FakeTensorMode()
    weights = {n: torch.nn.Parameter(FakeTensor(fake, x, torch.device("cuda:0"))) for n, x in meta.items()}
    (moved,) = Room(groups(weights, made)).moved(0, [(0, 1.0)])[0].values()
    assert moved.shape == (5, 7)
    assert moved.is_cuda


class Wrong:
    """Kernels whose numbers are others."""

    def __init__(self, error: Exception | None = None):
        self.error = error

    def add(self, *_: Any) -> None:
        if self.error:
            raise self.error

    def add_rows(self, stream: Any, shift: float, table_nc: torch.Tensor, rows_n: torch.Tensor) -> torch.Tensor:
        return table_nc[rows_n]

    def tables(self, *_: Any) -> None: ...

    def add_many(self, stream: Any, shift: float, source_e: torch.Tensor, tables: Any) -> torch.Tensor:
        return source_e


@pytest.mark.parametrize("row", [-1, 5])
def test_a_row_that_is_not_there_is_not_read(row, monkeypatch):
    monkeypatch.setattr(kernels, "kernel_for", lambda *_: Wrong())
    table_nc, stream = torch.zeros(5, 7), walsh.Stream(1, 2, 3)
    assert kernels.add_rows(stream, 1.0, table_nc, torch.tensor([0, 4])) is not None
    with pytest.raises(RuntimeError, match="a row is looked up that its table does not have"):
        kernels.add_rows(stream, 1.0, table_nc, torch.tensor([0, row]))


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (Wrong(), "their numbers differ from the processor's"),
        (Wrong(RuntimeError("Failed to find C compiler")), "RuntimeError while they were compiled"),
    ],
)
def test_kernels_that_are_wrong_or_do_not_compile_are_not_used(kernel, said, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_installed", lambda: kernel)
    kernels._compiled.cache_clear()
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        assert [kernels.kernel_for(walsh.Stream(1, 2, 3), on_gpu) for _ in range(2)] == [None, None]
    kernels._compiled.cache_clear()
    assert [record.getMessage().partition("kernels: ")[2] for record in caplog.records] == [said]  # once


def test_what_kernels_cannot_do(monkeypatch):
    monkeypatch.setattr(kernels, "_compiled", lambda device: "kernels")
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=None)
    assert kernels.kernel_for(walsh.Stream(1, 2, 3), on_gpu) == "kernels"
    assert kernels.kernel_for(None, on_gpu) is None
    assert kernels.kernel_for(walsh.Stream(1, 2, 3, row=1 << 31), on_gpu) == "kernels"
    assert kernels.kernel_for(walsh.Stream(1, 2, 3, row=1 << 32), on_gpu) is None  # counted in 32 bits
    on_gpu.dtype = torch.float64
    assert kernels.kernel_for(walsh.Stream(1, 2, 3), on_gpu) is None  # whose shift would be rounded to float32
    made = Directions("0" * 32, {"w": torch.Size((4, 7))}, 2, Law("rademacher"), masks={"w": torch.ones(4, 7) > 0})
    assert made.stream("w", 0, 0) is None
    assert Directions("0" * 32, {"w": torch.Size((4, 7))}, 2, Law("rademacher", 1)).stream("w", 0, 0) is None
    assert Directions("0" * 32, {"w": torch.Size((4, 7))}, 2, classes=["w"]).stream("w", 0, 0) is None

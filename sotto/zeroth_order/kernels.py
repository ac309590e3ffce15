"""Where weights are moved by one kernel (`kernel`) instead of a chain of operations: on a CUDA device.

Triton comes with torch's CUDA builds. It compiles when it is first called, for which it needs a C compiler. Where it is
missing, does not compile, or makes other bits than the processor does, these functions do nothing and say so, and the
caller takes the way that is open everywhere.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from sotto.zeroth_order import laws, walsh

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger(__name__)


def add(stream: walsh.Stream | None, shift: float, source_e: torch.Tensor, first: int, target_e: torch.Tensor) -> bool:
    """target = source + shift * u, of the flat elements of a direction from number `first` on; False if not done.

    The target may be the source. For signs the product is exact and the sum is rounded once, to the type of both.
    """
    kernel = kernel_for(stream, target_e)
    if kernel is None:
        return False
    if not isinstance(target_e, FakeTensor):  # in a forecast, what takes no memory is not run
        kernel.add(stream, shift, source_e, first, target_e)
    return True


def add_rows(
    stream: walsh.Stream | None, shift: float, table_nc: torch.Tensor, rows_n: torch.Tensor
) -> torch.Tensor | None:
    """(n, c) rows of table + shift * u, repeated ones too; None if not done.

    A row that is not there fails, as in torch, when the device gets to it.
    """
    kernel = kernel_for(stream, table_nc)
    if kernel is None:
        return None
    if isinstance(table_nc, FakeTensor):
        return table_nc[rows_n]
    inside_n = (rows_n >= 0) & (rows_n < len(table_nc))  # the kernel would read what lies beside the table
    torch._assert_async(inside_n.all(), "a row is looked up that its table does not have")  # type: ignore[call-overload]
    return kernel.add_rows(stream, shift, table_nc.contiguous(), rows_n.contiguous())


def entries(stream: walsh.Stream, start: int, stop: int, device: torch.device) -> torch.Tensor | None:
    """(stop - start,) float32, some elements of a direction; None if not done."""
    if device.type != "cuda":
        return None
    out = torch.zeros(stop - start, dtype=torch.float32, device=device)
    return out if add(stream, 1.0, out, start, out) else None


def kernel_for(stream: walsh.Stream | None, tensor: torch.Tensor) -> Any:
    """The module of kernels that can add to a tensor; None if there is none."""
    if stream is None or not tensor.is_cuda or tensor.dtype not in _TYPES or stream.row >> 32 > 0:
        return None
    return _installed() if isinstance(tensor, FakeTensor) else _compiled(tensor.device)


@functools.cache
def _installed() -> Any:
    found = importlib.util.find_spec("triton") and torch.cuda.is_available()
    return importlib.import_module("sotto.zeroth_order.kernel") if found else None


@functools.cache
def _compiled(device: torch.device) -> Any:
    """The kernels, once they have been seen to give the processor's bits on a device."""
    kernel = _installed()
    if kernel is None:
        return None
    try:
        why = "" if agree(kernel, device) else "their numbers differ from the processor's"
    except Exception as error:  # compilers and drivers fail in ways of their own
        why = f"{type(error).__name__} while they were compiled"
    if why:
        _log.warning("weights are moved by slower operations on %s, without the Triton kernels: %s", device, why)
    return None if why else kernel


def agree(kernel: Any, device: torch.device) -> bool:
    """Whether the kernels give on a device what the processor gives, under every law of entries."""
    sizes = {"v": 131, "w": 9 * 5000}
    for streams in walsh.examples(sizes):
        expected: dict[str, torch.Tensor] = {}
        for name, n in sizes.items():
            entries = laws.signs(streams[name].words(0, -(-n // laws.PER_WORD)))[:n]
            sizes_e = streams[name].sizes(0, n)
            if sizes_e is not None:
                sizes_e.give(entries, 0, streams[name].stretch)
            expected[name] = torch.tensor(entries)
        if not _agree_on(kernel, device, streams, expected, 0.0 if streams["w"].places is None else 1e-6):
            return False
    return True


def _agree_on(
    kernel: Any, device: torch.device, streams: dict[str, walsh.Stream], expected: dict[str, torch.Tensor],
    tolerance: float,
) -> bool:  # fmt: skip
    """Moved tensors agree within a tolerance, as products may be rounded or not; entries themselves to the last bit."""
    table_e, rows_n = torch.linspace(-1, 1, 45_000), torch.tensor([8, 0, 8])
    moved_e = table_e.add(expected["w"], alpha=0.125)
    part_e = torch.empty(40_000, device=device)
    kernel.add(streams["w"], 0.125, table_e[133:40_133].to(device), 133, part_e)
    found_nc = kernel.add_rows(streams["w"], 0.125, table_e.view(9, 5000).to(device), rows_n.to(device))
    sizes = [len(x) for x in expected.values()]
    tables = kernel.tables(list(streams.values()), sizes, device)
    both_e = torch.zeros(sum(sizes), device=device)
    kernel.add_many(streams["v"], 1.0, both_e, tables)
    return (
        torch.equal(both_e.cpu(), torch.cat(list(expected.values())))
        and torch.allclose(part_e.cpu(), moved_e[133:40_133], rtol=0, atol=tolerance)
        and torch.allclose(found_nc.cpu(), moved_e.view(9, 5000)[rows_n], rtol=0, atol=tolerance)
    )

"""Weight + shift * direction in one kernel, on a CUDA device.

The operations of `counter`, `walsh` and `laws` make the same entries, each as a pass through memory of its own:
together they took hundreds of times a forward pass. Here a block of 128 signs stays where Philox has made it, and what
goes through memory is the weight once and its moved copy once. Triton brings Philox along.

For signs, the bits are those of the other way: a sign times a number is exact, so one rounding is left, and it is that
of the sum. For Gaussian entries the product may be rounded or not before it is added.

Shape legend: b blocks of four words, w words of 32 signs, n rows of a table and c its columns, e flat elements,
T tensors, P programs.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import importlib
from typing import Any

import torch

from sotto.zeroth_order import laws
from sotto.zeroth_order.counter import signed
from sotto.zeroth_order.walsh import Stream

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

BLOCKS = 32
"""Blocks of 128 signs that one program makes."""
_SIGNED = ["key", "places", "step", "index", "row", "low", "first_word", "first", "length", "parts"]


@triton.jit
def _words(key, step, index, block):  # type: ignore[no-untyped-def]
    """The four words of each block."""
    c0, c1 = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    same = tl.zeros_like(c0)
    return tl.philox(key, c0, c1, same + index.to(tl.uint32), same + step.to(tl.uint32))


@triton.jit
def _shifts(  # type: ignore[no-untyped-def]
    key, places, step, index, row, low, first_word, first_block, shift, table,
    WALSH: tl.constexpr, SIZES: tl.constexpr, RUN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """(w,) numbers of words, and (w, 32) shift * entries of a direction, from a block on. SIZES: how many, or 0."""
    w0, w1, w2, w3 = _words(key, step, index, first_block + tl.arange(0, BLOCKS))
    words_w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCKS * 4,))
    number_w = first_block * 4 + tl.arange(0, BLOCKS * 4)
    if WALSH:
        common = (number_w + first_word).to(tl.uint32) & row.to(tl.uint32)
        common ^= common >> 16
        common ^= common >> 8
        common ^= common >> 4
        common ^= common >> 2
        common ^= common >> 1
        words_w ^= (0 - (common & 1)) ^ low.to(tl.uint32)
    negative = (words_w[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
    shifts = tl.where(negative == 1, -shift, shift)
    if SIZES > 0:
        run_w = number_w // (RUN // 32)
        d0, d1, d2, d3 = _words(places, step, index, run_w // 4)
        drawn = tl.where(run_w % 4 == 0, d0, tl.where(run_w % 4 == 1, d1, tl.where(run_w % 4 == 2, d2, d3)))
        place_w = (drawn & (SIZES - 1)).to(tl.int32) + (number_w % (RUN // 32)).to(tl.int32) * 32
        shifts *= tl.load(table + place_w[:, None] + tl.arange(0, 32)[None, :])
    return number_w, shifts


@triton.jit(do_not_specialize=_SIGNED)
def _add(  # type: ignore[no-untyped-def]
    target, source, rows, table, shift, key, places, step, index, row, low, first_word, first, length, parts,
    GATHER: tl.constexpr, WALSH: tl.constexpr, SIZES: tl.constexpr, RUN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program moves a part of one row: of the table's row `rows[n]`, or of one of `length` elements from `first`."""
    place, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    begin = first.to(tl.int64)
    if GATHER:
        begin = tl.load(rows + place).to(tl.int64) * length
    first_block = begin // 128 + part.to(tl.int64) * BLOCKS
    number_w, shifts = _shifts(
        key, places, step, index, row, low, first_word, first_block, shift, table, WALSH, SIZES, RUN, BLOCKS
    )
    element = number_w[:, None] * 32 + tl.arange(0, 32)[None, :] - begin
    inside = (element >= 0) & (element < length)
    at = element
    if GATHER:
        at = element + begin
    value = tl.load(source + at, mask=inside).to(tl.float32)
    at = place.to(tl.int64) * length + element
    tl.store(target + at, (value + shifts).to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["step", "index", "row", "low"])
def _add_many(  # type: ignore[no-untyped-def]
    flat, tensors, programs, table, shift, step, index, row, low,
    WALSH: tl.constexpr, SIZES: tl.constexpr, RUN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program moves a part of one of many tensors, which lie one after another."""
    of, part = tensors + 5 * tl.load(programs + 2 * tl.program_id(0)), tl.load(programs + 2 * tl.program_id(0) + 1)
    key, places, first_word = tl.load(of), tl.load(of + 1), tl.load(of + 2)
    start, length = tl.load(of + 3), tl.load(of + 4)
    number_w, shifts = _shifts(
        key, places, step, index, row, low, first_word, part * BLOCKS, shift, table, WALSH, SIZES, RUN, BLOCKS
    )
    element = number_w[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = element < length
    value = tl.load(flat + start + element, mask=inside).to(tl.float32)
    tl.store(flat + start + element, (value + shifts).to(flat.dtype.element_ty), mask=inside)


def add(stream: Stream, shift: float, source_e: torch.Tensor, first: int, target_e: torch.Tensor) -> None:
    """target = source + shift * u, of the flat elements from number `first` on. Both may be one tensor."""
    _launch(stream, shift, source_e, source_e, first, target_e.numel(), 1, target_e, gather=False)


def add_rows(stream: Stream, shift: float, table_nc: torch.Tensor, rows_n: torch.Tensor) -> torch.Tensor:
    """(n, c) some rows of table + shift * u."""
    target_nc = table_nc.new_empty(len(rows_n), table_nc.shape[1])
    _launch(stream, shift, table_nc, rows_n, 0, table_nc.shape[1], len(rows_n), target_nc, gather=True)
    return target_nc


def tables(streams: list[Stream], sizes: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, 5) and (P, 2) int64 on a device, for `add_many`: of these streams, and tensors of these sizes in a row."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    rows = [
        [signed(s.key, 64), signed(s.places or 0, 64), s.first_word, start, n]
        for s, start, n in zip(streams, starts, sizes, strict=True)
    ]
    programs = [[i, part] for i, n in enumerate(sizes) for part in range(-(-n // (128 * BLOCKS)))]
    return torch.tensor(rows, device=device), torch.tensor(programs, device=device)


def add_many(stream: Stream, shift: float, flat_e: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Adds shift * u to tensors that lie in a row.

    Args:
      stream: of one of them; of the others, all but the keys and the first word are the same.
      tables: from `tables`.
    """
    rows, programs = tables
    _add_many[(len(programs),)](
        flat_e, rows, programs, laws.sizes_on(flat_e.device), shift * stream.stretch,
        stream.step, stream.index, stream.row, signed(stream.low, 32), **_constants(stream),
    )  # fmt: skip


def _launch(
    stream: Stream, shift: float, source: torch.Tensor, rows: torch.Tensor, first: int, length: int, count: int,
    target: torch.Tensor, gather: bool,
) -> None:  # fmt: skip
    parts = -(-(length + 127) // (128 * BLOCKS))
    _add[(parts * count,)](
        target, source, rows, laws.sizes_on(source.device), shift * stream.stretch,
        signed(stream.key, 64), signed(stream.places or 0, 64), stream.step, stream.index, stream.row,
        signed(stream.low, 32), stream.first_word, first, length, parts, GATHER=gather, **_constants(stream),
    )  # fmt: skip


def _constants(stream: Stream) -> dict[str, Any]:
    sizes = laws.SIZES if stream.places is not None else 0
    return {"WALSH": stream.row >= 0, "SIZES": sizes, "RUN": laws.RUN, "BLOCKS": BLOCKS}

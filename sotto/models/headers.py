"""Reads the header of a safetensors file by hand: names, types and shapes, without the weights and without torch.

The file comes from elsewhere, so nothing in it is believed: sizes are capped before anything is parsed, and every
tensor must lie inside the file. What is covered: truncated files, damaged headers, headers that only exist to exhaust
memory. What is not covered: that the numbers are the ones the author meant (pin `model.revision` for that).

Format: 8 bytes little-endian header length N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sotto.errors import SottoError

MAX_HEADER_BYTES = 8 * 2**20
"""A model of 50,000 tensors needs about 5 MB. The format itself allows 100 MB, enough to stall a machine."""
MAX_TENSORS = 50_000

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a checkpoint: its safetensors type name (`F32`, `BF16`, ...) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        return "F" in self.dtype


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Reads the tensors that a safetensors file says it holds.

    Returns:
      tensor name -> header, in the file's order.

    Raises:
      SottoError: SOT304, the file is truncated, damaged, or its header is larger than any real model's.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise _corrupt(file, f"it has {size} bytes, and the first 8 must hold the header's length")
        length = int.from_bytes(prefix, "little")
        if length > size - 8:
            raise _corrupt(file, f"its header claims {length} bytes, but only {size - 8} follow")
        if length > MAX_HEADER_BYTES:
            raise _corrupt(file, f"its header has {length} bytes; Sotto reads at most {MAX_HEADER_BYTES}")
        entries = _parse(file, stream.read(length))
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise _corrupt(file, f"its header names {len(entries)} tensors; Sotto reads at most {MAX_TENSORS}")
    tensors, spans = {}, []
    for name, entry in entries.items():
        tensors[name], span = _tensor(file, name, entry)
        spans.append((*span, name))
    _check_layout(file, spans, size - 8 - length)
    return tensors


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            # Two readers could take different ones, so that what was checked is not what is loaded.
            raise ValueError("the same name stands in it twice")
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, f"its header is not JSON ({str(error)[:80]})") from None
    if not isinstance(entries, dict):
        raise _corrupt(file, "its header is not a JSON object")
    return entries


def _tensor(file: Path, name: str, entry: Any) -> tuple[TensorHeader, tuple[int, int]]:
    """One header entry, checked. Returns the header and the bytes it spans, [begin, end)."""
    shown = name[:80]
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _corrupt(file, f"tensor '{shown}' lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _corrupt(file, f"tensor '{shown}' has the unknown type {str(dtype)[:20]!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise _corrupt(file, f"tensor '{shown}' has a shape or offsets that are not whole numbers")
    header = TensorHeader(dtype, tuple(shape))
    if math.prod(max(size, 1) for size in shape) >= 2**60:  # its zeros hide a stride that no library can count to
        raise _corrupt(file, f"tensor '{shown}' has a shape that no machine could hold")
    if (offsets[1] - offsets[0]) * 8 != header.numel * _BITS[dtype]:
        raise _corrupt(
            file, f"tensor '{shown}' spans {offsets[1] - offsets[0]} bytes, which is not its shape times its type"
        )
    return header, (offsets[0], offsets[1])


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_layout(file: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """The tensors must tile the data exactly: no overlap, no hole, nothing beyond the end, nothing left over."""
    end = 0
    for begin, stop, name in sorted(spans):
        if stop > data_bytes:
            raise _corrupt(file, f"tensor '{name[:80]}' ends at byte {stop} of {data_bytes}: the file is cut short")
        if begin != end:
            raise _corrupt(file, f"tensor '{name[:80]}' begins at byte {begin}, but {end} was expected")
        end = stop
    if end != data_bytes:
        raise _corrupt(file, f"{data_bytes - end} bytes after the last tensor belong to nothing")


def _corrupt(file: Path, detail: str) -> SottoError:
    return SottoError(
        "SOT304",
        what=f"{file.name} is not a sound safetensors file: {detail}.",
        where=str(file),
        why="Weights from a damaged file would be wrong without any sign of it.",
        fix="Download or copy the file again and compare its checksum with the publisher's.",
    )

"""Stored outputs of a frozen backbone's layers, so that later passes over the same data do not run it.

With a side network, nothing that is trained changes what the backbone gives. So its outputs can be computed once and
read in every later epoch. What is stored is as private as the text itself: the files are readable by their owner
alone, lie in the run's folder, and are deleted by `wipe`.

How a row is stored depends on that row alone: in float16, or in bfloat16, which has fewer digits, where it holds a
value beyond 65,504. Were the type chosen for all rows together, one unit's text could change what is computed for
everybody, and move the clipped sum by more than its bound.

A kill costs what was not yet marked as finished. A row is marked after its values are on disk, with a checksum over
them, and the checksums of all finished rows are compared when a cache is opened again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto.errors import SottoError

DTYPES = (torch.float16, torch.bfloat16)
ABOUT, HIDDEN, ROWS = "about.json", "hidden.bin", "rows.bin"
DONE = 1 << 32
"""Added to a finished row's checksum, once for float16 and twice for bfloat16: zero bytes mean that it is not there."""


class ActivationCache:
    """One file of half-precision numbers, (layers, tokens, d) for each row of a dataset, without padding.

    Shape legend: B rows asked for, T tokens of the longest of them, d width of the backbone.
    """

    def __init__(self, folder: Path, lengths: Sequence[int], layers: Sequence[int], width: int):
        self.folder, self.layers, self.width = folder, tuple(layers), width
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._hidden = os.open(folder / HIDDEN, flags, 0o600)
        self._rows = os.open(folder / ROWS, flags, 0o600)
        _reserve(self._hidden, max(1, self.bytes), folder)
        _reserve(self._rows, max(8, 8 * self.num_rows), folder)
        self._marks = np.memmap(folder / ROWS, dtype=np.uint64, mode="r", shape=(max(1, self.num_rows),))
        self._values = np.memmap(folder / HIDDEN, dtype=np.int16, mode="r", shape=(max(1, self.bytes) // 2,))
        self._sound = np.array([self._is_sound(row) for row in range(self.num_rows)], dtype=bool)

    @classmethod
    def open(
        cls,
        folder: Path,
        lengths: Sequence[int],
        layers: Sequence[int],
        width: int,
        fingerprint: str = "",
    ) -> ActivationCache:
        """Opens a cache, or makes an empty one. One that was made for anything else is wiped first.

        Args:
          folder: belongs to the cache alone; its parent exists.
          lengths: tokens of each row of the dataset.
          layers: indices of the layers whose outputs are kept.
          width: d, numbers per token and layer.
          fingerprint: of the data and the backbone (see `fingerprint`): stored outputs are of use for these alone.

        Raises:
          SottoError: SOT350, there is no room for it, or the folder cannot be written.
        """
        digest = hashlib.sha256(np.asarray(lengths, dtype=np.int64).tobytes()).hexdigest()
        about = {
            "version": 2,
            "layers": list(layers),
            "width": width,
            "lengths": digest,
            "made_for": fingerprint,
        }
        try:
            if (folder / ABOUT).is_file() and json.loads((folder / ABOUT).read_text()) != about:
                wipe(folder)
            if not folder.exists():
                folder.mkdir(mode=0o700)
                folder.chmod(0o700)
            cache = cls(folder, lengths, layers, width)
            _write_private(folder / ABOUT, json.dumps(about, indent=2) + "\n")
        except OSError as error:
            raise _no_room(folder, error.strerror or str(error)) from error
        return cache

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1

    @property
    def bytes(self) -> int:
        """Size of the stored numbers: 2 * tokens * layers * d."""
        return 2 * int(self.starts[-1]) * len(self.layers) * self.width

    def missing(self) -> list[int]:
        """Rows that are not stored, the shortest first: batches of like lengths have little padding."""
        rows = np.flatnonzero(~self._sound)
        lengths = self.starts[rows + 1] - self.starts[rows]
        return rows[np.argsort(lengths, kind="stable")].tolist()

    def write(self, rows: Sequence[int], outputs: Mapping[int, torch.Tensor]) -> None:
        """Stores the outputs of some rows. What is not finite is stored as it is: it spoils its own row alone.

        Args:
          rows: their numbers in the dataset, B of them.
          outputs: layer -> (B, T, d), padded on the right.
        """
        given = {layer: outputs[layer].detach().cpu() for layer in self.layers}
        marks = {}
        for i, row in enumerate(rows):
            length = self._length(row)
            exact_LTd = torch.stack([given[layer][i, :length] for layer in self.layers])
            values_LTd, kind = exact_LTd.half(), 1
            if not bool(torch.isfinite(values_LTd).all()):
                values_LTd, kind = exact_LTd.bfloat16(), 2
            content = values_LTd.view(torch.int16).numpy().tobytes()
            _write_all(self._hidden, content, self._offset(row) * 2)
            marks[row] = kind * DONE + zlib.crc32(content)
        os.fsync(self._hidden)  # before any of them is marked
        for row, mark in marks.items():
            _write_all(self._rows, mark.to_bytes(8, "little"), 8 * row)
            self._sound[row] = True
        os.fsync(self._rows)

    def read(self, rows: Sequence[int], device: torch.device | str = "cpu") -> dict[int, torch.Tensor]:
        """The stored outputs of some rows: layer -> (B, T, d) in float32, zeros behind the end of a row.

        Raises:
          SottoError: SOT352, a row is not stored.
        """
        absent = [row for row in rows if not self._sound[row]]
        if absent:
            raise SottoError(
                "SOT352", what=f"{len(absent)} of {len(rows)} rows are not in the activation cache",
                where=str(self.folder), why="their outputs have not been computed, or were damaged on disk",
                fix="fill the cache first: fill(cache, model, ...)",
            )  # fmt: skip
        longest = max((self._length(row) for row in rows), default=0)
        found = torch.zeros(len(self.layers), len(rows), longest, self.width)
        for i, row in enumerate(rows):
            found[:, i, : self._length(row)] = self._stored(row)
        return {layer: found[k].to(device) for k, layer in enumerate(self.layers)}

    def close(self) -> None:
        """Releases the files. They stay."""
        for descriptor in (self._hidden, self._rows):
            os.close(descriptor)
        del self._marks, self._values

    def wipe(self) -> None:
        """Closes and deletes the cache. On most disks deleted blocks stay until they are reused: encrypt the disk."""
        self.close()
        wipe(self.folder)

    def _length(self, row: int) -> int:
        return int(self.starts[row + 1] - self.starts[row])

    def _offset(self, row: int) -> int:
        return int(self.starts[row]) * len(self.layers) * self.width

    def _raw(self, row: int) -> np.ndarray:
        return np.array(self._values[self._offset(row) : self._offset(row + 1)])

    def _stored(self, row: int) -> torch.Tensor:
        flat = torch.from_numpy(self._raw(row)).view(DTYPES[int(self._marks[row]) // DONE - 1])
        return flat.view(len(self.layers), self._length(row), self.width)

    def _is_sound(self, row: int) -> bool:
        mark = int(self._marks[row])
        return mark // DONE in (1, 2) and mark % DONE == zlib.crc32(self._raw(row).tobytes())


def fill(
    cache: ActivationCache, model: Any, batch_of: Callable[[list[int]], dict[str, torch.Tensor]], rows_at_once: int
) -> int:
    """Runs the backbone on all rows that are not stored yet.

    Args:
      model: with a side network (`side.add_side`).
      batch_of: row numbers -> `input_ids`, `attention_mask`, ..., each (B, T), padded on the right.

    Returns:
      how many rows were computed.
    """
    missing = cache.missing()
    for start in range(0, len(missing), rows_at_once):
        rows = missing[start : start + rows_at_once]
        cache.write(rows, model.backbone_outputs(**batch_of(rows)))
    return len(missing)


def fingerprint(model: nn.Module, data: str) -> str:
    """Digest of a backbone's frozen weights and of what the caller says of the data."""
    digest = hashlib.sha256(data.encode())
    for name, value in model.named_parameters():
        if not value.requires_grad:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _reserve(descriptor: int, size: int, folder: Path) -> None:
    """Takes the whole size on disk at once, so that no run stops for lack of room after hours."""
    os.fchmod(descriptor, 0o600)
    if os.fstat(descriptor).st_size == size:
        return
    os.ftruncate(descriptor, 0)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"it needs {size / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free")
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_private(file: Path, text: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)


def wipe(folder: Path) -> None:
    """Deletes the files that a cache consists of, and no others."""
    for name in (ABOUT, ROWS, HIDDEN):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _no_room(folder: Path, detail: str) -> SottoError:
    return SottoError(
        "SOT350",
        what=f"The activation cache cannot be written: {detail}.",
        where=str(folder),
        why="It holds the outputs of the backbone's layers for every token of the training data.",
        fix="Keep fewer layers (a side layer at every second one), free disk space, or train without it.",
    )

"""What a customer has sent to be classified, on disk before it leaves: each text is privatized once.

Noise that is drawn anew for every query of the same text is averaged away as surely as noise that is drawn anew in
every epoch. So a text that is asked about again, in the same session or after a break, leaves as the same bytes. The
vendor sees from them that it is the same text, and nothing more of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sotto.data.examples import Examples
from sotto.split.cache import append_private
from sotto.split.wire import Agreement, Piece

DIGEST = 32

Draw = Callable[[Examples, np.ndarray], Piece]
"""(texts, which of them) to a fresh release: `Customer.query`."""


class QueryBook:
    """Releases by the hash of the text, in a file that is only appended to and readable by its owner alone."""

    def __init__(self, path: Path, agreement: Agreement):
        """Opens the book. A record that a crash has cut off was never sent, so it is dropped."""
        self._path, self._ids = path, agreement.values == "ids"
        self._width, self._row_bytes = agreement.width, agreement.row_bytes
        self._known: dict[bytes, np.ndarray] = {}
        data, place = path.read_bytes() if path.exists() else b"", 0
        while len(data) - place >= DIGEST + 4:
            rows = int.from_bytes(data[place + DIGEST : place + DIGEST + 4], "little")
            start = place + DIGEST + 4
            if start + rows * self._row_bytes > len(data):
                break
            values = np.frombuffer(data, "<i4" if self._ids else "<f2", rows * self._row_bytes // self._size, start)
            self._known[data[place : place + DIGEST]] = values if self._ids else values.reshape(rows, self._width)
            place = start + rows * self._row_bytes
        if place < len(data):
            os.truncate(path, place)

    @property
    def _size(self) -> int:
        return 4 if self._ids else 2

    def take(self, examples: Examples, chosen: np.ndarray, draw: Draw) -> Piece:
        """What leaves of some texts: what has left of them before, and fresh releases of the others.

        Raises:
          SottoError: SOT823, a fresh one cannot be stored. Nothing of it has left.
        """
        names = [_name(examples, int(example)) for example in chosen]
        new = {name: place for place, name in reversed(list(enumerate(names))) if name not in self._known}
        if new:
            drawn = draw(examples, chosen[sorted(new.values())])
            parts = np.split(drawn.values, np.cumsum(drawn.lengths_E)[:-1])
            order = sorted(new, key=new.__getitem__)
            append_private(self._path, b"".join(self._record(n, part) for n, part in zip(order, parts, strict=True)))
            self._known.update(zip(order, parts, strict=True))
        rows = [self._known[name] for name in names]
        return Piece(np.array([len(row) for row in rows], dtype=np.int32), None, np.concatenate(rows))

    def _record(self, name: bytes, rows: np.ndarray) -> bytes:
        values = np.ascontiguousarray(rows, "<i4" if self._ids else "<f2")
        return name + len(rows).to_bytes(4, "little") + values.tobytes()


def _name(examples: Examples, example: int) -> bytes:
    ids = examples.input_ids[examples.offsets[example] : examples.offsets[example + 1]]
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).digest()

"""Representations on disk: drawn once on the customer's side, and kept as they are on both.

The noise of a text is drawn once. A second draw would be a second release, and the mean of many draws is the text
itself, so there is no way to ask an `Outbox` for one: whoever opens it again, after a crash or for another epoch, finds
the bytes that are there. Files are readable by their owner alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from sotto.errors import SottoError
from sotto.split import wire
from sotto.split.wire import Agreement, Manifest, Piece, PieceFacts

ABOUT, MANIFEST = "about.json", "manifest.json"


class Outbox:
    """What leaves the customer: made once, sent as often as the connection breaks."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def fill(
        cls,
        folder: Path,
        agreement: Agreement,
        about: dict[str, object],
        sizes: Sequence[int],
        make: Callable[[int], Piece],
    ) -> Outbox:
        """Opens the outbox, or makes what is missing of it.

        Args:
          folder: belongs to the outbox; its parent exists.
          about: what it is a release of: data, model and privatizer. Compared when it is opened again.
          sizes: examples of each piece.
          make: draws piece i. Called only for pieces that are not on the disk.

        Raises:
          SottoError: SOT822 the folder holds the release of something else, SOT823 it cannot be written or is damaged.
        """
        text = json.dumps({"agreement": agreement.__dict__, **about}, sort_keys=True)
        try:
            _own_folder(folder)
            if not (folder / ABOUT).exists():
                write_private(folder / ABOUT, text.encode())
            if (folder / ABOUT).read_bytes() != text.encode():
                raise other_release(folder)
            lines = [_stored_or_new(folder, i, size, agreement, make) for i, size in enumerate(sizes)]
            manifest = Manifest(agreement, tuple(lines))
            if not (folder / MANIFEST).exists():
                write_private(folder / MANIFEST, manifest.to_json().encode())
        except OSError as error:
            raise _disk(folder, error) from error
        if (folder / MANIFEST).read_bytes() != manifest.to_json().encode():
            raise damaged(folder / MANIFEST)
        return cls(folder, manifest)

    def read(self, index: int) -> bytes:
        """The bytes of a piece."""
        return (self.folder / _name(index)).read_bytes()

    @property
    def bytes(self) -> int:
        return sum(self.manifest.agreement.piece_bytes(p.examples, p.rows) for p in self.manifest.pieces)


def _stored_or_new(
    folder: Path, index: int, size: int, agreement: Agreement, make: Callable[[int], Piece]
) -> PieceFacts:
    path = folder / _name(index)
    note = path.with_suffix(".json")
    if note.exists():
        try:
            facts = PieceFacts(**json.loads(note.read_text()))
        except (ValueError, TypeError, RecursionError):
            raise damaged(note) from None
        # Not drawn again: a damaged piece may have been sent already.
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != facts.sha256:
            raise damaged(path)
        return facts
    piece = make(index)
    assert len(piece.lengths_E) == size, (len(piece.lengths_E), size)
    data = wire.encode(piece)
    facts = wire.facts_of(piece, data)
    wire.decode(data, facts, agreement)
    write_private(path, data)
    write_private(note, json.dumps(facts.__dict__).encode())  # it counts as made only from here on
    return facts


class Inbox:
    """What the vendor has been sent: piece after piece, each once, in order."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.received = 0
        for index, facts in enumerate(manifest.pieces):
            path = folder / _name(index)
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != facts.sha256:
                break
            self.received = index + 1

    @classmethod
    def open(cls, folder: Path, text: str, expected: Agreement) -> Inbox:
        """Agrees to a manifest, or goes on with an upload that was broken off.

        Raises:
          SottoError: SOT820 it is not what was agreed, or another upload has begun here; SOT823 no room.
        """
        manifest = Manifest.from_json(text, expected)
        try:
            _own_folder(folder)
            if (folder / MANIFEST).exists():
                if (folder / MANIFEST).read_bytes() != manifest.to_json().encode():
                    wire.refuse("another upload has begun here", "manifest")
            else:
                write_private(folder / MANIFEST, manifest.to_json().encode())
        except OSError as error:
            raise _disk(folder, error) from error
        return cls(folder, manifest)

    @property
    def complete(self) -> bool:
        return self.received == len(self.manifest.pieces)

    def accept(self, index: int, data: bytes) -> None:
        """Stores the next piece.

        Raises:
          SottoError: SOT821, it is not the next one, or not what the manifest says; SOT823 no room.
        """
        if index != self.received or self.complete:
            wire.refuse_piece("it is not the next one")
        wire.decode(data, self.manifest.pieces[index], self.manifest.agreement)
        try:
            write_private(self.folder / _name(index), data)
        except OSError as error:
            raise _disk(self.folder, error) from error
        self.received += 1

    def open_all(self) -> Representations:
        """The whole upload, for training."""
        if not self.complete:
            raise SottoError(
                "SOT824", what=f"{self.received} of {len(self.manifest.pieces)} pieces have arrived",
                where=str(self.folder), why="training on a part would be another run than the one agreed on",
                fix="let the customer connect again",
            )  # fmt: skip
        return Representations.read(self.folder, self.manifest)


class Representations:
    """E examples as the vendor has them, read from the disk as needed. There is nothing random in it.

    Attributes:
      lengths_E: rows of each example.
      labels_E: (E,) int64, or None if they are kept.
    """

    def __init__(self, pieces: Sequence[Piece], agreement: Agreement):
        self.agreement = agreement
        self._pieces = list(pieces)
        self.lengths_E = np.concatenate([p.lengths_E for p in pieces]).astype(np.int64)
        labels = [p.labels_E for p in pieces if p.labels_E is not None]
        self.labels_E = torch.from_numpy(np.concatenate(labels).astype(np.int64)) if labels else None
        counts = [len(p.lengths_E) for p in pieces]
        self._piece_of = np.repeat(np.arange(len(pieces)), counts)
        self._start = np.concatenate([np.cumsum(p.lengths_E) - p.lengths_E for p in pieces]).astype(np.int64)

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> Representations:
        """Maps the files of a folder into memory and checks them once more."""
        pieces = []
        for index, facts in enumerate(manifest.pieces):
            mapped = np.memmap(folder / _name(index), dtype=np.uint8, mode="r")
            pieces.append(wire.decode(mapped, facts, manifest.agreement))
        return cls(pieces, manifest.agreement)

    def __len__(self) -> int:
        return len(self.lengths_E)

    def rows(self, example: int) -> np.ndarray:
        """(R, n) float16 or (R,) int32: what was sent of one example."""
        start = self._start[example]
        return self._pieces[self._piece_of[example]].values[start : start + self.lengths_E[example]]

    def batch(self, examples: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (B, T, n) float32 or (B, T) int64, padded on the right, and the mask (B, T)."""
        lengths = torch.from_numpy(self.lengths_E[np.asarray(examples)])
        most = int(lengths.max())
        ids = self.agreement.values == "ids"
        shape = (len(lengths), most) if ids else (len(lengths), most, self.agreement.width)
        values = torch.zeros(shape, dtype=torch.int64 if ids else torch.float32)
        for place, example in enumerate(examples):
            row = self.rows(int(example))
            values[place, : len(row)] = torch.from_numpy(row.astype(np.int64 if ids else np.float32))
        return values, (torch.arange(most) < lengths[:, None]).to(torch.int64)


def _name(index: int) -> str:
    return f"piece-{index:06d}.bin"


def _own_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(mode=0o700)
    folder.chmod(0o700)


def write_private(path: Path, data: bytes) -> None:
    """Whole or not at all, and readable by the owner alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append_private(path: Path, data: bytes) -> None:
    """Appends to a file that its owner alone can read, and returns when it is on the disk. Whole or not at all.

    Raises:
      SottoError: SOT823, it cannot be written; the file is as before.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    size = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(data):  # a full disk first shows as a short write
            written += os.write(descriptor, data[written:])
        os.fsync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, size)  # else the next record would be read as a part of this one
        raise _disk(path, error) from error
    finally:
        os.close(descriptor)


def _disk(folder: Path, error: OSError) -> SottoError:
    return SottoError(
        "SOT823", what=f"cannot write: {error.strerror or error}", where=str(folder),
        why="representations are kept on disk, so that their noise is drawn once", fix="make room, and start again",
    )  # fmt: skip


def other_release(folder: Path) -> SottoError:
    """What is stored here was made of something else."""
    return SottoError(
        "SOT822", what="the folder holds the release of other data, or with other settings", where=str(folder),
        why="a second release of the same texts tells more than one; it must be meant",
        fix="restore the configuration and the data, or name another folder for a new release",
    )  # fmt: skip


def damaged(path: Path) -> SottoError:
    """A file of an outbox is not what it was. It is not drawn again, because it may have been sent."""
    return SottoError(
        "SOT823", what="a stored release is damaged", where=str(path),
        why="drawing it again would be a second release of the same texts",
        fix="restore the file; or remove the whole folder, and count the new release as a second one",
    )  # fmt: skip

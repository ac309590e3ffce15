"""What passes from customer to vendor: a manifest, and pieces of bytes, checked before anything is made of them.

A piece holds, one after the other: the number of rows of each of its examples (int32), their labels (int32, unless they
are kept), and the rows (float16 numbers, or int32 token ids). The manifest says how long each piece is and gives its
SHA-256, so that a vendor knows the size of everything before it allocates anything, and reserves nothing for what it
has not agreed to. Nothing else is sent: no text, no seed, no statistic of the data.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NoReturn

import numpy as np

from sotto.errors import SottoError

VERSION = 1
MOST_BYTES = 1 << 30
"""The largest piece that is taken."""
MOST_EXAMPLES = 100_000_000


@dataclass(frozen=True)
class Agreement:
    """What both sides know beforehand, each from its own configuration.

    Attributes:
      bottom: SHA-256 of the part of the model that the customer runs.
      layer, width: where the model is cut, and how many numbers a row has there.
      values: `float16` rows, or `ids` of a vocabulary with `vocabulary` tokens.
      classes: K.
      labels: whether they come along as they are, randomised, or not at all.
      segment: consecutive tokens that a row stands for; 0: all of a text.
      max_rows: rows of one example at most.
    """

    bottom: str
    layer: int
    width: int
    values: Literal["float16", "ids"]
    vocabulary: int
    classes: int
    labels: Literal["sent", "randomised", "kept"]
    segment: int
    max_rows: int

    @property
    def row_bytes(self) -> int:
        return 4 if self.values == "ids" else 2 * self.width

    def piece_bytes(self, examples: int, rows: int) -> int:
        """Size of a piece."""
        return examples * (4 if self.labels == "kept" else 8) + rows * self.row_bytes


def without_labels(agreement: Agreement) -> Agreement:
    """The same for queries, which have none."""
    return replace(agreement, labels="kept")


@dataclass(frozen=True)
class PieceFacts:
    """Size and checksum of one piece."""

    examples: int
    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that is sent, before it is sent."""

    agreement: Agreement
    pieces: tuple[PieceFacts, ...]

    @property
    def examples(self) -> int:
        return sum(piece.examples for piece in self.pieces)

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, expected: Agreement) -> Manifest:
        """Reads a manifest of the other side without believing it.

        Raises:
          SottoError: SOT820 it is not what was agreed on, or not a manifest at all.
        """
        try:
            given: dict[str, Any] = json.loads(text)
            version, agreement, pieces = given.pop("version"), given.pop("agreement"), given.pop("pieces")
            if given or version != VERSION or not isinstance(agreement, dict) or not isinstance(pieces, list):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            refuse("the manifest cannot be read")
        wanted = asdict(expected)
        if agreement.keys() != wanted.keys():
            refuse("the manifest cannot be read")  # and its names are not repeated: they are the other side's words
        for name in sorted(wanted):
            if type(agreement[name]) is not type(wanted[name]) or agreement[name] != wanted[name]:
                refuse(f"'{name}' is not what this side has", name)
        return cls(expected, tuple(check_piece(piece, expected) for piece in pieces))


def check_piece(given: Any, agreement: Agreement) -> PieceFacts:
    """A line of a manifest, or the head of a query. Raises SOT820 if its sizes cannot be."""
    if not isinstance(given, dict) or given.keys() != {"examples", "rows", "sha256"}:
        refuse("a piece is not described as agreed")
    examples, rows, sha256 = given["examples"], given["rows"], given["sha256"]
    counts = all(type(count) is int and 0 < count < MOST_EXAMPLES for count in (examples, rows))
    if not counts or not examples <= rows <= examples * agreement.max_rows:
        refuse("a piece has more rows than its examples can have, or none")
    if agreement.piece_bytes(examples, rows) > MOST_BYTES:
        refuse("a piece is larger than 1 GiB")
    if not isinstance(sha256, str) or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        refuse("a checksum is not one")
    return PieceFacts(examples, rows, sha256)


def refuse(what: str, where: str = "") -> NoReturn:
    """Raises SOT820. The message never holds anything that the other side sent."""
    raise SottoError(
        "SOT820", what=what, where=where or "what the other side sent",
        why="customer and vendor must agree on the model, the cut, the classes and the sizes before anything is stored",
        fix="compare the two configurations and the SHA-256 of the bottom; nothing was stored",
    )  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A piece that has been checked.

    Attributes:
      lengths_E: rows of each example.
      labels_E: classes, or None if they are kept.
      values: (R, n) float16 or (R,) int32; read-only.
    """

    lengths_E: np.ndarray
    labels_E: np.ndarray | None
    values: np.ndarray


def encode(piece: Piece) -> bytes:
    """The bytes of a piece, little-endian."""
    parts = [piece.lengths_E.astype("<i4")]
    if piece.labels_E is not None:
        parts.append(piece.labels_E.astype("<i4"))
    parts.append(piece.values.astype("<i4" if piece.values.ndim == 1 else "<f2", copy=False))
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def facts_of(piece: Piece, data: bytes) -> PieceFacts:
    return PieceFacts(len(piece.lengths_E), len(piece.values), hashlib.sha256(data).hexdigest())


def decode(data: bytes | np.ndarray, facts: PieceFacts, agreement: Agreement) -> Piece:
    """Checks a piece against its line of the manifest, and takes it apart without copying.

    Raises:
      SottoError: SOT821, the length, the checksum, a number of rows, a label, an id or a number is not what was agreed.
    """
    view = memoryview(data)  # type: ignore[arg-type]
    if view.nbytes != agreement.piece_bytes(facts.examples, facts.rows):
        refuse_piece("it has another length than the manifest says")
    if hashlib.sha256(view).hexdigest() != facts.sha256:
        refuse_piece("it is damaged, or another one")
    lengths = np.frombuffer(view, "<i4", facts.examples)
    place, labels = 4 * facts.examples, None
    if agreement.labels != "kept":
        labels = np.frombuffer(view, "<i4", facts.examples, place)
        place += 4 * facts.examples
        if ((labels < 0) | (labels >= agreement.classes)).any():
            refuse_piece(f"a label is not one of the {agreement.classes} classes that were declared")
    if (lengths < 1).any() or (lengths > agreement.max_rows).any() or int(lengths.sum()) != facts.rows:
        refuse_piece("the numbers of rows of its examples do not add up")
    if agreement.values == "ids":
        values = np.frombuffer(view, "<i4", facts.rows, place)
        if ((values < 0) | (values >= agreement.vocabulary)).any():
            refuse_piece("a token is not in the vocabulary")
    else:
        values = np.frombuffer(view, "<f2", facts.rows * agreement.width, place).reshape(facts.rows, agreement.width)
        # An exponent of ones is infinite or no number; numpy's own test of halves takes ten times as long.
        if ((values.view("<u2") & 0x7C00) == 0x7C00).any():
            refuse_piece("a number is not finite")
    return Piece(lengths, labels, values)


def refuse_piece(what: str) -> NoReturn:
    """Raises SOT821. What has been stored before stays."""
    raise SottoError(
        "SOT821", what=f"a piece was refused: {what}", where="what the other side sent",
        why="what is not exactly what the manifest announced is not trained on",
        fix="send it again; what was stored before is kept",
    )  # fmt: skip

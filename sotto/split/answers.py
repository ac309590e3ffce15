"""What a customer has answered about labels that it keeps, on disk before it is sent.

A crash of the customer must not make it forget what its answers have cost, and a crash of the vendor makes it ask the
same question again. So the same question gets the same answer, which is no second release, and every other one counts.

The noise of an answer is scaled to the number of answers that will be given. So a book belongs to that number: one that
was begun for fewer answers, each with less noise, is not gone on with for more.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import torch

from sotto.split.cache import append_private, other_release
from sotto.split.labels import LabelKeeper

DIGEST = 32
HEAD = struct.Struct("<qd")
"""How often each example is answered, and the deviation of the noise."""


class AnswerBook:
    """Answers by the hash of the question, in a file that is only appended to and readable by its owner alone."""

    def __init__(self, path: Path, keeper: LabelKeeper, classes: int):
        """Opens the book and counts what stands in it against the keeper's budget.

        A record that a crash has cut off was never sent, so it is dropped.

        Raises:
          SottoError: SOT822, it was begun for another number of answers or another budget.
        """
        self._path, self._keeper, self._classes = path, keeper, classes
        self._known: dict[bytes, torch.Tensor] = {}
        data, place, head = path.read_bytes() if path.exists() else b"", HEAD.size, HEAD.pack(keeper.uses, keeper.std)
        if len(data) < HEAD.size:
            if data:
                os.truncate(path, 0)
            append_private(path, head)
            data = head
        if data[: HEAD.size] != head:
            raise other_release(path)
        while len(data) - place >= DIGEST + 4:
            count = int.from_bytes(data[place + DIGEST : place + DIGEST + 4], "little")
            end = place + DIGEST + 4 + 4 * count * (1 + classes)
            if end > len(data):
                break
            examples = np.frombuffer(data, "<i4", count, place + DIGEST + 4)
            values = np.frombuffer(data, "<f4", count * classes, place + DIGEST + 4 + 4 * count)
            self._known[data[place : place + DIGEST]] = torch.from_numpy(values.reshape(count, classes).copy())
            keeper.spend(torch.from_numpy(examples.astype(np.int64)))
            place = end
        if place < len(data):
            os.truncate(path, place)

    def answer(self, examples_B: torch.Tensor, scores_BK: torch.Tensor) -> torch.Tensor:
        """(B, K) noised gradients, as `LabelKeeper.answer` gives them; drawn once for each question.

        Raises:
          SottoError: SOT801, see there; SOT823, the answer cannot be stored. It is not given then, and counts.
        """
        asked = examples_B.numpy().astype("<i4").tobytes() + scores_BK.numpy().astype("<f4").tobytes()
        digest = hashlib.sha256(asked).digest()
        if digest not in self._known:
            values = self._keeper.answer(examples_B, scores_BK)
            record = digest + len(examples_B).to_bytes(4, "little") + examples_B.numpy().astype("<i4").tobytes()
            append_private(self._path, record + values.numpy().astype("<f4").tobytes())
            self._known[digest] = values
        return self._known[digest]

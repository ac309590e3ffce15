"""Who says what between customer and vendor, without saying over which connection.

The customer calls and the vendor answers, so that the customer's machine opens no port. Four calls: `hello` with the
manifest, `piece` with the next bytes, `step` for whatever the training needs (nothing, or noised gradients of labels
that are kept), `query` with privatized texts. Every answer begins with a byte that says whether it is one or a refusal,
and a refusal holds a code and nothing of what was sent.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sotto.errors import SottoError
from sotto.rundir import RunDir
from sotto.split import wire
from sotto.split.answers import AnswerBook
from sotto.split.cache import Inbox, Representations
from sotto.split.vendor import Vendor
from sotto.split.watch import Watch
from sotto.split.wire import Agreement, Piece, PieceFacts

log = logging.getLogger(__name__)

METHODS = ("hello", "piece", "step", "query")
TICKET = 16
"""Bytes of the number that a session is known by. A new `hello` ends the session before it."""
WAIT, DONE, SCORES = b"W", b"D", b"S"
PATIENCE = 1.0
"""Seconds that a `step` waits for the training to need something, before the customer has to ask again."""

Call = Callable[[str, bytes], bytes]
"""(method, request) to answer: a connection to the vendor, whatever carries it."""


class VendorService:
    """The vendor's end: checks every call, stores the upload, trains in a thread of its own, scores queries.

    Attributes:
      watch: is told what happens.
    """

    def __init__(self, vendor: Vendor, run: RunDir, watch: Watch | None = None):
        self.vendor, self.run, self.watch = vendor, run, watch or Watch()
        self.inbox: Inbox | None = None
        self._ticket = b""
        self._lock = threading.Lock()
        self._asked: queue.Queue[bytes] = queue.Queue(maxsize=1)
        self._answers: queue.Queue[torch.Tensor] = queue.Queue(maxsize=1)
        self._open = 0
        self._training: threading.Thread | None = None
        self._failed: BaseException | None = None

    @property
    def most_bytes(self) -> int:
        """The largest request that can be one. A connection refuses larger ones unread."""
        agreed, examples = self.vendor.agreement, self.vendor.setting.chunk_examples
        return agreed.piece_bytes(examples, examples * agreed.max_rows) + (4 << 20)

    def call(self, method: str, request: bytes) -> bytes:
        """Answers one call. Never raises for what the customer sent."""
        try:
            if method not in METHODS or len(request) > self.most_bytes:
                wire.refuse("the call is none of the protocol's, or too large")
            if method == "hello":
                return b"\0" + self._hello(request)
            if len(self._ticket) != TICKET or not secrets.compare_digest(request[:TICKET], self._ticket):
                wire.refuse("the session is not this one: the customer has connected again, or never said hello")
            return b"\0" + getattr(self, f"_{method}")(request[TICKET:])
        except SottoError as error:
            log.warning("refused a %s: %s %s", method if method in METHODS else "call", error.code, error.what)
            return b"\1" + error.code.encode()

    def _hello(self, request: bytes) -> bytes:
        try:
            text = request.decode()
        except UnicodeDecodeError:
            wire.refuse("the manifest cannot be read")
        with self._lock:
            inbox = Inbox.open(self.run.path / "private" / "inbox", text, self.vendor.agreement)
            again = bool(self._ticket)
            self.inbox, self._ticket = inbox, secrets.token_bytes(TICKET)
            self.watch.connected(self, again)
            self._start_training()
            return self._ticket + inbox.received.to_bytes(4, "little")

    def _piece(self, request: bytes) -> bytes:
        if len(request) < 4:
            wire.refuse_piece("it has no number")
        with self._lock:
            assert self.inbox is not None
            self.inbox.accept(int.from_bytes(request[:4], "little"), request[4:])
            self._start_training()
            return self.inbox.received.to_bytes(4, "little")

    def _step(self, request: bytes) -> bytes:
        with self._lock:
            if request:
                self._take_answer(request)
        try:
            asked = self._asked.get(timeout=PATIENCE)
            self._asked.put(asked)  # until it is answered: a customer that connects again must find it
            return asked
        except queue.Empty:
            if self._failed is not None:
                wire.refuse("the training has failed on the vendor's side")
            finished = self._training is not None and not self._training.is_alive()
            return DONE if finished else WAIT

    def _take_answer(self, request: bytes) -> None:
        classes = self.vendor.agreement.classes
        values = np.frombuffer(request, "<f4") if len(request) == 4 * self._open * classes else np.empty(0)
        if self._asked.empty() or not values.size or not np.isfinite(values).all():
            wire.refuse("the answer does not fit what was asked")
        self._asked.get()
        self._answers.put(torch.from_numpy(values.reshape(-1, classes).copy()))

    def _query(self, request: bytes) -> bytes:
        if self._training is None or self._training.is_alive() or self._failed is not None:
            wire.refuse("the model is not trained yet")
        scores = self.vendor.predict(parse_query(request, self.vendor.agreement))
        self.watch.asked(len(scores))
        return scores.numpy().astype("<f4").tobytes()

    def _start_training(self) -> None:
        assert self.inbox is not None
        if self.inbox.complete and self._training is None:
            self._training = threading.Thread(target=self._train, args=(self.inbox.open_all(),), daemon=True)
            self._training.start()

    def _train(self, sent: Representations) -> None:
        answer = self._ask if self.vendor.setting.labels == "kept" else None
        try:
            self.watch.training(self)
            self.vendor.train(sent, self.run.checkpoints, answer, lambda step, loss: self.watch.stepped(step))
            self.watch.trained(self)
        except BaseException as error:
            self._failed = error
            self.watch.failed()
            log.exception("training failed")

    def _ask(self, examples_B: torch.Tensor, scores_BK: torch.Tensor) -> torch.Tensor:
        self._open = len(examples_B)
        parts = [SCORES, examples_B.numpy().astype("<i4").tobytes(), scores_BK.numpy().astype("<f4").tobytes()]
        self._asked.put(b"".join(parts))
        return self._answers.get()

    def wait(self) -> None:
        """Until the training has ended. Raises what ended it."""
        while self._training is None or self._training.is_alive():
            threading.Event().wait(0.05)
        if self._failed is not None:
            raise self._failed


@dataclass
class CustomerSession:
    """The customer's end of a connection."""

    call: Call
    agreement: Agreement
    ticket: bytes = b""

    def _ask(self, method: str, request: bytes) -> bytes:
        reply = self.call(method, request)
        if reply[:1] == b"\0":
            return reply[1:]
        code = reply[1:7].decode("ascii", "replace")
        shown = code if re.fullmatch(r"SOT\d{3}", code) else "no reason"
        raise SottoError(
            "SOT826", what=f"the vendor refused a {method}: {shown}", where="the vendor",
            why="docs/errors.md says what the code means; nothing that was stored is lost",
            fix="correct it on the side that is wrong, and connect again",
        )  # fmt: skip

    def upload(self, manifest: wire.Manifest, read: Callable[[int], bytes]) -> int:
        """Sends what the vendor does not have yet, and returns how many pieces that were."""
        reply = self._ask("hello", manifest.to_json().encode())
        if len(reply) != TICKET + 4:
            wire.refuse("the vendor's greeting cannot be read")
        self.ticket, received = reply[:TICKET], int.from_bytes(reply[TICKET:], "little")
        for index in range(received, len(manifest.pieces)):
            self._ask("piece", self.ticket + index.to_bytes(4, "little") + read(index))
        return len(manifest.pieces) - received

    def train(self, book: AnswerBook | None) -> None:
        """Stays until the vendor has trained, and answers for the labels if they are kept.

        Raises:
          SottoError: SOT801, the vendor asked for something else than was agreed on.
        """
        reply = b""
        while True:
            asked = self._ask("step", self.ticket + reply)
            reply = b""
            if asked == DONE:
                return
            if asked != WAIT:
                reply = self._answer(asked, book)

    def _answer(self, asked: bytes, book: AnswerBook | None) -> bytes:
        classes = self.agreement.classes
        count, rest = divmod(len(asked) - 1, 4 + 4 * classes)
        if book is None or asked[:1] != SCORES or rest or not count:
            raise SottoError(
                "SOT801", what="the vendor asked for something that was not agreed on", where="setting.labels",
                why="gradients are given for scores alone, where labels are kept, and for nothing below",
                fix="stop; if this was no mistake, the vendor does not follow the protocol",
            )  # fmt: skip
        examples = np.frombuffer(asked, "<i4", count, 1).astype(np.int64)
        scores = np.frombuffer(asked, "<f4", count * classes, 1 + 4 * count).reshape(count, classes).copy()
        return book.answer(torch.from_numpy(examples), torch.from_numpy(scores)).numpy().astype("<f4").tobytes()

    def query(self, piece: Piece) -> torch.Tensor:
        """(E, K) scores of privatized texts."""
        data = wire.encode(piece)
        head = json.dumps(wire.facts_of(piece, data).__dict__).encode()
        reply = self._ask("query", self.ticket + len(head).to_bytes(4, "little") + head + data)
        shape = (len(piece.lengths_E), self.agreement.classes)
        if len(reply) != 4 * shape[0] * shape[1]:
            wire.refuse("the vendor's scores do not fit the query")
        return torch.from_numpy(np.frombuffer(reply, "<f4").reshape(shape).copy())


def parse_query(request: bytes, agreement: Agreement) -> Representations:
    """A query, checked as a piece of an upload is."""
    agreed = wire.without_labels(agreement)
    length = int.from_bytes(request[:4], "little")
    try:
        given: Any = json.loads(request[4 : 4 + length])
    except (ValueError, RecursionError):
        wire.refuse("the query cannot be read")
    facts: PieceFacts = wire.check_piece(given, agreed)
    return Representations([wire.decode(request[4 + length :], facts, agreed)], agreed)

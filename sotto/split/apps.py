"""Customer and vendor as apps of Flower: the calls of `protocol`, carried in the messages of Flower's Message API.

The vendor is a ServerApp and the customer a ClientApp. In Flower the server sends a message and the node replies to
it; in `protocol` the customer calls. So a message carries the answer to the customer's last call (or nothing, at
first), and the reply carries its next one. A call has a number, and the name of the process that makes it: one whose
answer was lost is answered again from memory, and not done twice.

A message holds numbers, the name of a call, and bytes: nothing of the configuration, no path, no text.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import get_object_type_from_object_content
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from sotto.errors import SottoError
from sotto.split import wire
from sotto.split.protocol import METHODS

log = logging.getLogger(__name__)

ACTION = "split"
PART = 4 << 20
"""Bytes of a record at most. Each record is sent, checked and stored as an object of its own."""
KINDS = {"Message", "RecordDict", "ConfigRecord"}
NAME = 16
IDLE = 0.01
"""Seconds between two looks for a customer, and for its reply."""
SHORTEST, LONGEST = 0.005, 0.5
"""The same at the customer, where each look is a call over the network: it waits longer the longer nothing comes."""


@dataclass(frozen=True)
class Asked:
    """A call of the customer: whose, which, and what."""

    name: bytes
    number: int
    method: str
    body: bytes


@dataclass(frozen=True)
class Answered:
    """The answer to a call; number 0 answers none."""

    number: int
    body: bytes


def whole(name: str, contents: dict[str, bytes]) -> Message:
    """A message from the objects that it came in. Only three kinds are put together.

    An array is not among them: its object may name a piece of it a million times.

    Args:
      name: of the object that is the message.
      contents: all objects by their names; emptied.

    Raises:
      SottoError: SOT820.
    """
    try:
        kinds = {get_object_type_from_object_content(content) for content in contents.values()}
        found = inflate_object_from_contents(name, contents) if kinds <= KINDS else None
    except Exception:
        found = None
    if not isinstance(found, Message):
        wire.refuse("the message is none of the protocol's")
    found.metadata.__dict__["_message_id"] = name
    return found


def _records(facts: dict[str, Any], body: bytes) -> RecordDict:
    parts = [body[start : start + PART] for start in range(0, len(body), PART)] or [b""]
    records = {"0": ConfigRecord({**facts, "bytes": parts[0]})}
    records |= {str(i): ConfigRecord({"bytes": part}) for i, part in enumerate(parts) if i}
    return RecordDict(records)  # type: ignore[arg-type]


def _facts(content: RecordDict, names: dict[str, type], most: int | None) -> tuple[dict[str, Any], bytes]:
    """The facts and the bytes of a content that has these and nothing else. Nothing is copied before the sizes fit."""
    facts, parts = {}, []
    for i in range(len(content)):
        record, wanted = content.get(str(i)), {"bytes": bytes} if i else {**names, "bytes": bytes}
        if not isinstance(record, ConfigRecord) or {name: type(value) for name, value in record.items()} != wanted:
            wire.refuse("the message is none of the protocol's")
        facts |= dict(record.items())
        parts.append(facts.pop("bytes"))
    if not parts:
        wire.refuse("the message is none of the protocol's")
    if most is not None and sum(len(part) for part in parts) > most:
        wire.refuse("the message is larger than a call can be")
    return facts, b"".join(parts)


def asked_content(asked: Asked) -> RecordDict:
    return _records({"name": asked.name, "number": asked.number, "method": asked.method}, asked.body)


def read_asked(content: RecordDict, most: int) -> Asked:
    """A call, if it is one of at most so many bytes.

    Raises:
      SottoError: SOT820.
    """
    facts, body = _facts(content, {"name": bytes, "number": int, "method": str}, most)
    if len(facts["name"]) != NAME or facts["method"] not in METHODS or facts["number"] < 1:
        wire.refuse("the message is none of the protocol's")
    return Asked(**facts, body=body)


def _number(content: RecordDict) -> int:
    """The number of a call that cannot be read otherwise, so that its refusal finds who made it; else 0."""
    head = content.get("0")
    number = head.get("number") if isinstance(head, ConfigRecord) else None
    return number if type(number) is int and 0 < number < 1 << 62 else 0


def answered_content(answered: Answered) -> RecordDict:
    return _records({"number": answered.number}, answered.body)


def read_answered(content: RecordDict) -> Answered:
    """An answer, or SOT820."""
    facts, body = _facts(content, {"number": int}, None)
    return Answered(**facts, body=body)


# ---- the vendor


class Desk:
    """Answers one call after the other, each once.

    Attributes:
      call: `VendorService.call`.
      most: bytes of the largest call.
    """

    def __init__(self, call: Callable[[str, bytes], bytes], most: int):
        self.call, self.most = call, most
        self._last: tuple[bytes, int] = (b"", 0)
        self._answered = Answered(0, b"")

    def answer(self, content: RecordDict) -> Answered:
        """The answer to a reply of the customer; the last one again, if that is what it asks for again."""
        try:
            asked = read_asked(content, self.most)
        except SottoError as error:
            log.warning("refused a message: %s %s", error.code, error.what)
            return Answered(_number(content), b"\1" + error.code.encode())
        if (asked.name, asked.number) != self._last:
            self._answered = Answered(asked.number, self._do(asked))
            self._last = (asked.name, asked.number)
        return self._answered

    def _do(self, asked: Asked) -> bytes:
        try:
            return self.call(asked.method, asked.body)
        except Exception as error:  # a full disk, for one; its text may name what this side keeps to itself
            log.error("a %s failed: %s", asked.method, type(error).__name__)
            return b"\1"


def server_app(desk: Desk, stop: threading.Event) -> ServerApp:
    """The vendor: asks the node that is there for calls, and answers them, until it is stopped."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        answered, node = Answered(0, b""), None
        while not stop.is_set():
            nodes = list(grid.get_node_ids())
            if node not in nodes:
                node, answered = (nodes[0] if nodes else None), Answered(0, b"")
            if node is None:
                stop.wait(IDLE)
                continue
            try:
                reply = _exchange(grid, Message(answered_content(answered), node, f"query.{ACTION}"), stop)
            except Exception as error:  # whatever came, the next message starts anew
                log.error("a message failed: %s", type(error).__name__)
                reply = None
                stop.wait(LONGEST)
            if reply is None or not reply.has_content():
                answered = Answered(0, b"")  # the answer may be lost; then the customer repeats its call
                stop.wait(IDLE)
                continue
            answered = desk.answer(reply.content)

    return app


def _exchange(grid: Grid, message: Message, stop: threading.Event) -> Message | None:
    """The reply to one message, or None if there will be none."""
    names = [name for name in grid.push_messages([message]) if name]
    while names and not stop.is_set():
        for reply in grid.pull_messages(names):
            return reply
        stop.wait(IDLE)
    return None


# ---- the customer


class Ended(Exception):
    """The customer has nothing more to ask."""


class Courier:
    """Takes calls from one thread, and gives them to the ClientApp in another."""

    def __init__(self) -> None:
        self._name, self._number = secrets.token_bytes(NAME), 0
        self._open: Asked | None = None
        self._calls: queue.Queue[tuple[str, bytes] | None] = queue.Queue()
        self._answers: queue.Queue[bytes | BaseException] = queue.Queue()
        self._broken: BaseException | None = None

    def call(self, method: str, request: bytes) -> bytes:
        """Asks the vendor; for `CustomerSession`."""
        if self._broken is not None:
            raise self._broken
        self._calls.put((method, request))
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end(self) -> None:
        """No call will come any more."""
        self._calls.put(None)

    def fail(self, error: BaseException) -> None:
        """The connection is broken: whoever waits for an answer gets this."""
        self._broken = error
        self._answers.put(error)

    def reply(self, message: Message) -> Message:
        """Takes the answer that a message carries, waits for the next call, and replies with it.

        Raises:
          Ended: there is none.
        """
        answered = read_answered(message.content)
        if self._open is not None and answered.number == self._open.number:
            self._open = None
            self._answers.put(answered.body)
        if self._open is None:
            call = self._calls.get()
            if call is None:
                raise Ended
            self._number += 1
            self._open = Asked(self._name, self._number, *call)
        return Message(asked_content(self._open), reply_to=message)


def client_app(courier: Courier) -> ClientApp:
    """The customer."""
    app = ClientApp()

    @app.query(ACTION)
    def query(message: Message, context: Context) -> Message:
        return courier.reply(message)

    return app

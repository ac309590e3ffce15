"""The server's side of masked rounds over Flower: three more exchanges of messages around that of the orders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from sotto.federated import messages
from sotto.federated.unmasking import MaskedRound

Accepts = Callable[[Iterable[Message], str], Iterator[tuple[int, Message]]]
"""(replies, group) -> (node, reply) of those nodes that were asked, once each."""


class MaskedExchange:
    """One round with the nodes of its users.

    Attributes:
      round: what the server knows of it.
      open: whether enough users are left.
    """

    def __init__(self, round: MaskedRound, grid: Grid, seconds: float, asked: Mapping[int, Sequence[int]]):
        """Begins a round.

        Args:
          grid: as Flower gives it to a strategy.
          seconds: that a stage waits.
          asked: node -> those of its users who were drawn.
        """
        self.round, self._grid, self._seconds, self._asked = round, grid, seconds, asked
        self.open = round.worth_asking

    def prepare(self, agreement: ConfigRecord, accepts: Accepts) -> bool:
        """Takes keys and shares, before any weights are sent. Returns whether there is a round to be had."""
        r = self.round
        replies = self._ask(messages.KEYS, self._asked, {"agreement": agreement}, accepts)
        self.open = r.take_keys(replies)
        if self.open:
            roster = {"roster": messages.masks_record(roster=r.roster)}
            members = self._among(r.users_at(range(len(r.roster))))
            self.open = r.take_shares(self._ask(messages.SHARES, members, roster, accepts))
        return self.open

    def orders(self) -> Iterator[tuple[int, list[int], ConfigRecord]]:
        """(node, its users, what they need to mask) for the orders of those who are present."""
        r = self.round
        position = dict(zip(r.users_at(r.present), r.present, strict=True))
        for node, users in self._among(list(position)).items():
            boxes = {str(user): _joined(r.boxes_for(position[user]), r.present) for user in users}
            yield node, users, messages.masks_record(present=r.present, **boxes)

    def finish(self, answers: Iterable[tuple[int, Any]], accepts: Accepts) -> None:
        """Takes the masked messages, and what takes the masks off their sum."""
        r = self.round
        if self.open and r.take_messages(answers):
            survivors = {"survivors": messages.masks_record(survivors=r.survivors)}
            left = self._among(r.users_at(r.survivors))
            r.take_reveals(self._ask(messages.REVEAL, left, survivors, accepts))

    def _ask(
        self,
        kind: str,
        asked: Mapping[int, Sequence[int]],
        records: Mapping[str, ConfigRecord],
        accepts: Accepts,
    ) -> Iterator[tuple[int, Any]]:
        if not self.open:
            return
        label = self.round.label
        sent = [messages.stage_message(kind, records, label, node, users) for node, users in asked.items()]
        for node, reply in accepts(self._grid.send_and_receive(sent, timeout=self._seconds), label):
            yield from messages.bytes_of(reply, asked.get(node, ()))

    def _among(self, users: Sequence[int]) -> dict[int, list[int]]:
        known = set(users)
        found = {node: [user for user in some if user in known] for node, some in self._asked.items()}
        return {node: some for node, some in found.items() if some}


def _joined(boxes: Mapping[int, bytes], present: Sequence[int]) -> bytes:
    """The boxes in the order of those who are present, without the receiver's own."""
    return b"".join(boxes[position] for position in present if position in boxes)

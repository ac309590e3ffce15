"""The server's side on Flower: a strategy of Flower's Message API whose rounds are the steps of the training loop.

Flower's own aggregation, clipping, noise and sampling have no part here: `configure_train` pays in the ledger and draws
from the register, `aggregate_train` bounds, adds, noises and updates. What Flower does is to carry messages and to say
which node sent one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from sotto.federated import messages
from sotto.federated.client import Order
from sotto.federated.cohort import Cohort
from sotto.federated.masked_strategy import MaskedExchange
from sotto.federated.server import Agreement, setting_of
from sotto.gradients.base import ClippedSum
from sotto.metrics import Metrics
from sotto.training import Session, begin_step, finish_step

log = logging.getLogger("sotto.federated")
POLL_SECONDS = 0.5
AT_ONCE = 16
"""Answers that are fetched in one call, so that memory does not grow with the number of nodes."""


class SottoStrategy(Strategy):
    """One round: reserve, draw, send, bound and add what comes back, noise, update, save.

    Nodes are asked once which of the registered users they have. A drawn user whose node is not there has not answered,
    and nothing is done about it: who answers must not depend on anything that the noise does not cover.
    """

    def __init__(self, session: Session, agreement: Agreement, metrics: Metrics, hello_seconds: float = 60.0):
        """Sets up the server of a run.

        Args:
          session: built with a carrier, so that no text is here.
          agreement: sent with every order; devices check it.
          metrics: of the run folder.
          hello_seconds: how long nodes have to say which users they have.
        """
        assert isinstance(session.engine, Cohort)
        self.session, self.agreement, self.metrics, self._patience = session, agreement, metrics, hello_seconds
        self._engine = session.engine
        self._homes: dict[int, range] = {}
        self._left_out: set[int] = set()
        self._open: tuple[int, np.ndarray] | None = None
        self._asked: dict[int, list[int]] = {}
        self._masked: MaskedExchange | None = None

    # ---- Flower's interface

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Pays for a round, draws its users, and writes the orders to their nodes."""
        self._open, self._asked, self._masked = None, {}, None
        if self.session.stop_requested or self.session.step >= self.session.plan.steps:
            return []
        self._meet(grid)
        step = self.session.step
        users = begin_step(self.session, step)
        if users is None:
            self.session.stop_requested = True
            return []
        self._open = (step, users)
        self._asked = self._at_home(users)
        order = self._engine.order(step)
        if self._engine.masked:
            self._masked = self._exchange(users, step, grid)
            if not self._masked.prepare(messages.agreement_record(self.agreement), self._from_asked):
                return []
        tensors = {"weights": messages.packed(order.weights)}
        if state := self._engine.codec.state():
            tensors["codec"] = messages.packed(state)
        asked = [(*pair, None) for pair in self._asked.items()] if self._masked is None else self._masked.orders()
        return [
            messages.order_message(tensors, order, self.agreement, node, some, _group(order), masks)
            for node, some, masks in asked
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Adds up what came back, noises it, and updates the weights."""
        if self._open is None:
            return None, None
        step, users = self._open
        self._open = None  # a round is closed once, whatever is called again
        total = self._total(users, self._answers(replies, _group(self._engine.order(step))), step)
        finish_step(self.session, step, users, total, self.metrics)
        return messages.packed(self._engine.order(step).weights), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Nobody is asked: scores of users would leave without noise."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Nothing: see `configure_evaluate`."""

    def summary(self) -> None:
        """Says what the run costs."""
        plan = self.session.plan
        log.info(
            "%s rounds, each of %s users on average out of %s: epsilon %s at delta %g",
            plan.steps, plan.expected_batch_size, plan.num_units, plan.planned_epsilon, plan.delta,
        )  # fmt: skip

    # ----

    def run(self, grid: Grid, timeout: float) -> bool:
        """Takes the rounds that are left. Returns False if the run was stopped and can be resumed."""
        left = self.session.plan.steps - self.session.step
        first = messages.packed(self._engine.order(self.session.step).weights)
        self.start(Streaming(grid), first, num_rounds=left, timeout=timeout)
        return self.session.step >= self.session.plan.steps or not self.session.stop_requested

    def _meet(self, grid: Grid) -> None:
        """Asks nodes that are new which users they have. One that is gone has none until it comes back.

        A node that is started again may have another number, and its users would else be those of the old one forever.
        """
        online = set(grid.get_node_ids())
        self._homes = {node: users for node, users in self._homes.items() if node in online}
        new = [node for node in sorted(online) if node not in self._homes and node not in self._left_out]
        if not new:
            return
        facts = messages.agreement_record(self.agreement)
        hellos = [Message(RecordDict({"agreement": facts}), node, messages.HELLO, ttl=self._patience) for node in new]
        for reply in grid.send_and_receive(hellos, timeout=self._patience):
            node = reply.metadata.src_node_id
            users = messages.users_of(reply, self.agreement.model, self.session.sampler.num_units)
            if isinstance(users, str):
                log.warning("node %s is left out: %s", node, users)
                if reply.has_content():  # a node that did not answer in time is asked again
                    self._left_out.add(node)
            elif any(_overlap(users, other) for other in self._homes.values()):
                log.warning("node %s is left out: it says that it has users of another node", node)
                self._left_out.add(node)
            else:
                self._homes[node] = users

    def _at_home(self, users: np.ndarray) -> dict[int, list[int]]:
        """Node -> those of the users that it has."""
        found = {node: [user for user in users.tolist() if user in home] for node, home in self._homes.items()}
        return {node: some for node, some in found.items() if some}

    def _exchange(self, users: np.ndarray, step: int, grid: Grid) -> MaskedExchange:
        seconds = setting_of(self.session.config).timeout
        return MaskedExchange(self._engine.masked_round(users, step), grid, seconds, self._asked)

    def _total(self, users: np.ndarray, answers: Iterator[tuple[int, Any]], step: int) -> ClippedSum:
        if self._masked is None:
            return self._engine.add_up(users, answers, step)
        self._masked.finish(answers, self._from_asked)
        return self._engine.close(self._masked.round, step)

    def _answers(self, replies: Iterable[Message], group: str) -> Iterator[tuple[int, Any]]:
        for node, reply in self._from_asked(replies, group):
            kind = "float32" if self._engine.shares is None else "int32"
            if self._masked is not None:
                kind = np.dtype(self._masked.round.word).name
            yield from messages.vectors_of(reply, self._asked[node], self._engine.codec.size, kind)

    def _from_asked(self, replies: Iterable[Message], group: str) -> Iterator[tuple[int, Message]]:
        """The answers to one exchange of nodes that were asked, one of each."""
        heard: set[int] = set()
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in self._asked or node in heard or reply.metadata.group_id != group:
                self._engine.heard.refuse("from a node that was not asked, of another round, or a second time")
                continue
            heard.add(node)
            yield node, reply


class Streaming(Grid):
    """A grid that hands out answers as they come, a few at a time, instead of all of them at the end of a round."""

    def __init__(self, inner: Grid):
        self._inner = inner

    def set_run(self, run: Any) -> None:
        self._inner.set_run(run)

    @property
    def run(self) -> Any:
        return self._inner.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._inner.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._inner.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yields answers until all are there or the time is over. What comes later is never fetched."""
        pushed = list(messages)
        waiting = [name for name in self._inner.push_messages(pushed) if name] if pushed else []
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while waiting:
            found = 0
            for start in range(0, len(waiting), AT_ONCE):
                some = waiting[start : start + AT_ONCE]
                for reply in self._inner.pull_messages(some):
                    found += 1
                    waiting = [name for name in waiting if name != reply.metadata.reply_to_message_id]
                    yield reply
                if found:
                    break  # the list has changed
            if not found:
                if time.monotonic() >= deadline:
                    return
                time.sleep(POLL_SECONDS)


def _group(order: Order) -> str:
    return f"{order.run}/{order.step}"


def _overlap(a: range, b: range) -> bool:
    short, long = (a, b) if len(a) <= len(b) else (b, a)
    return any(user in long for user in short)

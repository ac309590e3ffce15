"""The vendor's end of the connection: Flower's SuperLink, in this process, of which one customer sees what it needs.

Flower's own program `flower-superlink` serves at one port what nodes need and what operators need, and lets whoever
reaches it start apps. So it is not used. Here its server runs behind a gate that lets nothing through but the ten calls
of a node, no larger than they have to be, from one node at a time, over TLS for which the customer shows a certificate.
No app is stored: nothing is sent that the customer would run.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from flwr.superlink.main import create_app

from sotto.errors import SottoError
from sotto.split.apps import PART, Desk, server_app, whole
from sotto.split.network import Certificates, check, host_and_port, quiet
from sotto.split.protocol import VendorService

FLEET = "/v1/fleet/"
OPENING = ("register-node", "activate-node")
CALLS = (
    *OPENING, "deactivate-node", "unregister-node", "send-node-heartbeat", "pull-messages", "push-messages",
    "pull-object", "push-object", "confirm-message-received",
)  # fmt: skip
BODY = PART + (64 << 10)
"""Bytes of an HTTP body at most: one object, or the list of the objects of a message."""
OVERHEAD = 4 << 20


class Gate:
    """ASGI middleware: what is no call of a node, comes from a second node, or is too large, is refused unread.

    Attributes:
      left: bytes that may still come before the vendor has answered; else a customer could fill the memory.
    """

    def __init__(self, app: Any, most: int):
        self._app, self._most = app, most
        self.left = most
        self.busy: Callable[[], bool] = lambda: False

    def refill(self) -> None:
        self.left = self._most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None
        path = str(scope["path"])
        call = path.removeprefix(FLEET)
        if scope["method"] != "POST" or not path.startswith(FLEET) or call not in CALLS:
            return await _refuse(send, 404)
        if call in OPENING and self.busy():
            return await _refuse(send, 409)
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit() or len(length) > 12 or int(length) > BODY:
            return await _refuse(send, 413)
        if call.startswith("push"):
            if int(length) > self.left:
                return await _refuse(send, 413)
            self.left -= int(length)
        return await self._app(scope, receive, send)


async def _refuse(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b""})


class LinkGrid(InMemoryGrid):
    """The vendor's app at the SuperLink of its own process."""

    def __init__(self, factory: Any, gate: Gate):
        super().__init__(factory)
        self._gate = gate
        run = self.state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )  # fmt: skip
        self.set_run(self.state.get_run_info(run_ids=[run])[0])
        self._task = self.run.primary_task_id or 0
        self.state.claim_task(self._task)
        self.state.activate_task(self._task)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run, self._task, SUPERLINK_NODE_ID

    def get_node_ids(self) -> Iterable[int]:
        self.state.acknowledge_task_heartbeat(self._task)
        return super().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Gives messages to the SuperLink, each with its records as objects."""
        names = []
        for message in messages:
            self._gate.refill()
            with no_object_id_recompute():
                message.metadata.__dict__["_message_id"] = message.object_id
                self._check_message(message)
                if self._store(message, get_all_nested_objects(message)):
                    names.append(message.metadata.message_id)
        return names

    def _store(self, message: Message, objects: dict[str, Any]) -> bool:
        run = self.run.run_id
        bare = remove_content_from_message(message)
        # A node that finds the message before its objects would wait for a second.
        with self.state.lock:  # type: ignore[attr-defined]
            session = self.state.start_session(run)
            stored, missing = self.state.store_message_and_object_tree(bare, get_object_tree(message), session)
            for name in missing if stored else ():
                self.state.store_object(run, session, name, objects[name].deflate())
        return stored

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies whose objects have all come; they are taken out of the SuperLink."""
        self.state.acknowledge_task_heartbeat(self._task)
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            self.state.object_store.delete(reply.metadata.reply_to_message_id)  # if the node never took it
        return [self._whole(reply) for reply in replies]

    def _whole(self, reply: Message) -> Message:
        name, store = reply.metadata.message_id, self.state.object_store
        contents: dict[str, bytes] = {}
        try:
            for tree in iterate_object_tree(store.get_object_tree(name)):
                content = self.state.get_object(self.run.run_id, tree.object_id)
                while content == b"" and reply.metadata.src_node_id in self.get_node_ids():
                    threading.Event().wait(0.01)
                    content = self.state.get_object(self.run.run_id, tree.object_id)
                contents[tree.object_id] = content or b""
            return whole(name, contents)
        finally:
            store.delete(name)


def _socket(address: str) -> socket.socket:
    host, port = host_and_port(address)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise _not_listening(address) from None
    bound = socket.socket(family, kind, protocol)  # asyncio sends at once only if it is told that this is TCP
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
        bound.listen()
        return bound
    except OSError:
        bound.close()
        raise _not_listening(address) from None


def _not_listening(address: str) -> SottoError:
    return SottoError(
        "SOT829", what="the address cannot be listened on", where=address,
        why="another program uses it, or it is not one of this machine", fix="choose another port",
    )  # fmt: skip


@contextmanager
def serve(service: VendorService, address: str, certificates: Certificates | None, plaintext: bool) -> Iterator[int]:
    """Listens while the context lasts. Gives the port, which is chosen freely if the address says 0.

    Raises:
      SottoError: SOT827 not protected, SOT829 the address cannot be listened on.
    """
    check(address, certificates, plaintext)
    quiet()
    protection: dict[str, Any] = {}
    if certificates is not None:
        certificates.context(server=True)  # says what is wrong with them
        protection = {
            "ssl_certfile": str(certificates.certificate),
            "ssl_keyfile": str(certificates.private_key),
            "ssl_ca_certs": str(certificates.authority),
            "ssl_cert_reqs": ssl.CERT_REQUIRED,
        }
    app = create_app()
    _, factory = get_objectstore_linkstate_factories(FLWR_IN_MEMORY_DB_NAME, get_federation_manager())
    app.state.linkstate_factory = app.state.runtime_state_factory = factory
    gate = Gate(app, 2 * service.most_bytes + OVERHEAD)
    grid = LinkGrid(factory, gate)
    gate.busy = lambda: bool(list(grid.get_node_ids()))
    bound, stop = _socket(address), threading.Event()
    # A connection that the customer still takes for open must not be closed under its next call.
    config = uvicorn.Config(
        gate, log_config=None, access_log=False, ws="none", loop="asyncio", timeout_keep_alive=600, **protection
    )  # fmt: skip
    server = uvicorn.Server(config)
    vendor = server_app(Desk(service.call, service.most_bytes), stop)
    context = Context(grid.run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), {})
    threads = [
        threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True),
        threading.Thread(target=vendor, args=(grid, context), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        while not server.started:
            if not threads[0].is_alive():
                raise _not_listening(address)
            stop.wait(0.01)
        yield bound.getsockname()[1]
    finally:
        stop.set()
        server.should_exit = True
        for thread in threads:
            thread.join(10)
        bound.close()

"""The customer's end of the connection: a node of Flower, in this process, that runs no app but Sotto's own.

Flower's own program `flower-supernode` gets an app from the server and runs it. A vendor could send one that reads the
text. So this node makes the same calls, but for those that fetch an app, and passes each message to the ClientApp of
`apps`. It opens no port.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_objects, push_objects
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from sotto.errors import SottoError
from sotto.split.apps import LONGEST, SHORTEST, Courier, Ended, client_app, whole
from sotto.split.network import Certificates, check, quiet
from sotto.split.protocol import Call

DEADLINE = 600.0
"""Seconds for one call to the vendor's machine."""
BEAT = HEARTBEAT_MIN_INTERVAL
"""Seconds within which a sign of life is due. The vendor takes the node for gone after two without one."""
PATIENCE = 3.0 * BEAT
TAKEN = 409


class _Fleet(FleetHttpClient):
    """Flower's client; it follows no redirection, shows a certificate, and sends plain text through no proxy."""

    def __init__(self, address: str, certificates: Certificates | None, interceptors: list[Any]):
        scheme = "http" if certificates is None else "https"
        super().__init__(f"{scheme}://{address}", interceptors=interceptors, verify=False)
        self._client.close()
        self._client = httpx.Client(
            verify=False if certificates is None else certificates.context(server=False),
            timeout=DEADLINE, follow_redirects=False, trust_env=certificates is not None,
        )  # fmt: skip


class CustomerNode:
    """A node that is known to the vendor while the context of `connect` lasts."""

    def __init__(self, address: str, certificates: Certificates | None):
        private, public = generate_key_pairs()
        self._key, self._node = public_key_to_bytes(public), Node()
        signing = NodeAuthHttpInterceptor(private, public)
        self._client = _Fleet(address, certificates, [signing])

    def open(self, patience: float) -> None:
        """Makes itself known. A customer that was killed is taken for alive for a while, so it asks again."""
        until = time.monotonic() + patience
        while True:
            try:
                self._client.RegisterNode(RegisterNodeFleetRequest(public_key=self._key))
                opened = self._client.ActivateNode(
                    ActivateNodeRequest(public_key=self._key, heartbeat_interval=BEAT)
                )  # fmt: skip
                self._node = Node(node_id=opened.node_id)
                return
            except httpx.HTTPStatusError as error:
                if error.response.status_code != TAKEN or time.monotonic() > until:
                    raise
                time.sleep(LONGEST)

    def close(self) -> None:
        try:
            if self._node.node_id:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
                self._client.UnregisterNode(UnregisterNodeFleetRequest(node_id=self._node.node_id))
        except (httpx.HTTPError, ValueError):
            pass  # the vendor is gone
        finally:
            self._client.close()

    def beat(self) -> None:
        self._client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=BEAT))

    def receive(self) -> Message | None:
        """The next message for this node, if there is one."""
        response = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        run = message_from_proto(response.messages_list[0]).metadata.run_id
        tree = response.message_object_trees[0]
        fetch = make_pull_object_fn_protobuf(self._client.PullObject, self._node, run)
        contents = pull_objects([t.object_id for t in iterate_object_tree(tree)], fetch)
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=tree.object_id)
        )
        return whole(tree.object_id, contents)

    def send(self, message: Message) -> None:
        """Sends a reply: its head, and then its records, each as an object."""
        run = message.metadata.run_id
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            objects, tree = get_all_nested_objects(message), get_object_tree(message)
            bare = message_to_proto(remove_content_from_message(message))
            response = self._client.PushMessages(
                PushMessagesRequest(
                    node=self._node, messages_list=[bare], message_object_trees=[tree], clientapp_runtime_list=[0.0]
                )
            )
            push = make_push_object_fn_protobuf(self._client.PushObject, self._node, run, response.session_id)
            push_objects(objects, push, object_ids_to_push=set(response.objects_to_push))

    def context(self) -> Context:
        return Context(0, self._node.node_id, {}, RecordDict(), {})


def _work(node: CustomerNode, courier: Courier, over: threading.Event) -> None:
    """Passes messages to the ClientApp and its replies back, until there is nothing more to ask."""
    app, wait = client_app(courier), SHORTEST
    while not over.is_set():
        message = node.receive()
        if message is None:
            over.wait(wait)
            wait = min(LONGEST, 1.5 * wait)
            continue
        wait = SHORTEST
        try:
            node.send(app(message, node.context()))
        except Ended:
            return


def _beat(node: CustomerNode, over: threading.Event) -> None:
    while not over.wait(BEAT / 2):
        node.beat()


def _unreachable(address: str, error: BaseException) -> SottoError:
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == TAKEN:
        return SottoError(
            "SOT829", what="another customer is connected", where=address,
            why="a vendor serves one customer at a time", fix="stop the other one, or wait until it is done",
        )  # fmt: skip
    return SottoError(
        "SOT829", what=f"the vendor cannot be reached: {type(error).__name__}", where=address,
        why="it is not running, or the two sides do not accept each other's certificates",
        fix="start the vendor, and go on with --resume; nothing that was stored is lost",
    )  # fmt: skip


@contextmanager
def connect(
    address: str, certificates: Certificates | None, plaintext: bool, patience: float = PATIENCE
) -> Iterator[Call]:
    """A connection to a vendor.

    Args:
      patience: seconds for which it asks again while another customer is connected.

    Raises:
      SottoError: SOT827; and from every call too SOT829, the vendor cannot be reached or is not who it should be.
    """
    check(address, certificates, plaintext)
    quiet()
    node, courier, over = CustomerNode(address, certificates), Courier(), threading.Event()

    def guarded(work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(node, *arguments, over)
        except Exception as error:
            if not over.is_set():
                courier.fail(error if isinstance(error, SottoError) else _unreachable(address, error))

    threads = [
        threading.Thread(target=guarded, args=(_work, courier), daemon=True),
        threading.Thread(target=guarded, args=(_beat,), daemon=True),
    ]
    try:
        try:
            node.open(patience)
        except Exception as error:
            raise _unreachable(address, error) from None
        for thread in threads:
            thread.start()
        yield courier.call
    finally:
        over.set()
        courier.end()
        for thread in threads:
            if thread.ident is not None:
                thread.join(5)
        node.close()

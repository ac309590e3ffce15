"""The connection between customer and vendor: gRPC with mutual TLS.

Both sides show a certificate that one authority has signed, so a vendor serves only the customer that it knows, and the
customer sends only to the vendor that it knows. Without certificates it works between processes of one machine alone,
and only when asked. What is carried is bytes; `protocol` says what they mean. Sotto opens no other connection.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sotto.errors import SottoError
from sotto.split.protocol import METHODS, Call, VendorService

SERVICE = "sotto.split"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
DEADLINE = 600.0
"""Seconds for one call: an upload of a piece over a slow line, or the scores of a large query."""


@dataclass(frozen=True)
class Certificates:
    """Files in PEM format: this side's certificate and key, and the authority that has signed the other side's."""

    certificate: Path
    private_key: Path
    authority: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        try:
            return self.certificate.read_bytes(), self.private_key.read_bytes(), self.authority.read_bytes()
        except OSError as error:
            raise SottoError(
                "SOT827", what=f"a certificate cannot be read: {error.strerror}", where=str(error.filename),
                why="each side has to know the other before anything is sent", fix="name three PEM files",
            ) from None  # fmt: skip


def _grpc() -> Any:
    try:
        return importlib.import_module("grpc")
    except ImportError:
        raise SottoError(
            "SOT828", what="grpcio is not installed", where="sotto split vendor, sotto split customer",
            why="it carries what customer and vendor send", fix="pip install 'sotto[split]'",
        ) from None  # fmt: skip


def check(address: str, certificates: Certificates | None, plaintext: bool) -> None:
    """Refuses a connection without certificates, but for one on this machine that was asked for.

    Raises:
      SottoError: SOT827.
    """
    host, _, port = address.rpartition(":")
    good = bool(host) and port.isdigit()
    if good and (certificates is None) == plaintext and (certificates is not None or host in LOOPBACK):
        return
    raise SottoError(
        "SOT827",
        what="the address is not HOST:PORT" if not good else "the connection would not be protected",
        where=address,
        why="representations, and labels that are sent, must be read by the other side alone",
        fix="give --certificate, --key and --authority; or --plaintext-on-loopback with 127.0.0.1 to try it out",
    )


@contextmanager
def serve(service: VendorService, address: str, certificates: Certificates | None, plaintext: bool) -> Iterator[int]:
    """Listens while the context lasts. Gives the port, which is chosen freely if the address says 0.

    Raises:
      SottoError: SOT827 not protected, SOT828 gRPC is missing, SOT829 the address cannot be listened on.
    """
    check(address, certificates, plaintext)
    grpc = _grpc()

    def handler(method: str) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: service.call(method, request))

    # A larger message is refused by gRPC from its header, before it is read.
    options = [("grpc.max_receive_message_length", service.most_bytes), ("grpc.so_reuseport", 0)]
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=options)
    handlers = {method: handler(method) for method in METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    try:
        if certificates is None:
            port = server.add_insecure_port(address)
        else:
            certificate, private, authority = certificates.read()
            credentials = grpc.ssl_server_credentials([(private, certificate)], authority, require_client_auth=True)
            port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise SottoError(
            "SOT829", what="the address cannot be listened on", where=address,
            why="another program uses it, or it is not one of this machine", fix="choose another port",
        )  # fmt: skip
    server.start()
    try:
        yield port
    finally:
        server.stop(grace=2).wait()


@contextmanager
def connect(
    address: str, certificates: Certificates | None, plaintext: bool, deadline: float = DEADLINE
) -> Iterator[Call]:
    """A connection to a vendor.

    Raises:
      SottoError: SOT827, SOT828; and from every call SOT829, the vendor cannot be reached or is not who it should be.
    """
    check(address, certificates, plaintext)
    grpc = _grpc()
    options = [("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]
    if certificates is None:
        channel = grpc.insecure_channel(address, options)
    else:
        certificate, private, authority = certificates.read()
        credentials = grpc.ssl_channel_credentials(authority, private, certificate)
        channel = grpc.secure_channel(address, credentials, options)
    calls = {method: channel.unary_unary(f"/{SERVICE}/{method}") for method in METHODS}

    def call(method: str, request: bytes) -> bytes:
        try:
            return calls[method](request, timeout=DEADLINE, wait_for_ready=False)
        except grpc.RpcError as error:
            raise SottoError(
                "SOT829", what=f"the vendor cannot be reached: {error.code().name.lower()}", where=address,
                why="it is not running, or the two sides do not accept each other's certificates",
                fix="start the vendor, and go on with --resume; nothing that was stored is lost",
            ) from None  # fmt: skip

    try:
        yield call
    finally:
        channel.close()

"""What protects the connection between customer and vendor, before Flower opens it.

Both sides show a certificate that one authority has signed, so a vendor serves only the customer that it knows, and the
customer sends only to the vendor that it knows. Without certificates it works between processes of one machine alone,
and only when asked.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from sotto.errors import SottoError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SILENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@dataclass(frozen=True)
class Certificates:
    """Files in PEM format: this side's certificate and key, and the authority that has signed the other side's."""

    certificate: Path
    private_key: Path
    authority: Path

    def context(self, server: bool) -> ssl.SSLContext:
        """TLS with a certificate of this side, that asks the other side for its own.

        Raises:
          SottoError: SOT827, a file cannot be read or is none.
        """
        found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        found.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            found.load_cert_chain(self.certificate, self.private_key, password=lambda: "")
            found.load_verify_locations(self.authority)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise SottoError(
                "SOT827", what=f"a certificate cannot be read: {getattr(error, 'strerror', None) or 'not PEM'}",
                where=", ".join(str(p) for p in (self.certificate, self.private_key, self.authority)),
                why="each side has to know the other before anything is sent", fix="name three PEM files",
            ) from None  # fmt: skip
        found.verify_mode = ssl.CERT_REQUIRED
        return found


def require_flower() -> None:
    """Raises SOT828 where Flower is not installed."""
    if importlib.util.find_spec("flwr") is None:
        raise SottoError(
            "SOT828", what="Flower is not installed", where="sotto split vendor, sotto split customer",
            why="it carries what customer and vendor send", fix="pip install 'sotto[split]'",
        )  # fmt: skip


def quiet() -> None:
    """Switches off what Flower would report to its makers, and what it would log of every message."""
    os.environ.update(SILENT)
    logging.getLogger("flwr").setLevel(logging.ERROR)


def host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def check(address: str, certificates: Certificates | None, plaintext: bool) -> None:
    """Refuses a connection without certificates, but for one on this machine that was asked for.

    Raises:
      SottoError: SOT827.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 1 << 16):
        raise SottoError(
            "SOT827", what="the address is not HOST:PORT", where=address, why="it says where the two sides meet",
            fix="write for example 127.0.0.1:9443; a port is at most 65535",
        )  # fmt: skip
    if (certificates is None) == plaintext and (certificates is not None or host in LOOPBACK):
        if certificates is not None:
            certificates.context(server=False)  # files that cannot be read are found before any text is
        return
    raise SottoError(
        "SOT827",
        what="the connection would not be protected",
        where=address,
        why="representations, and labels that are sent, must be read by the other side alone",
        fix="give --certificate, --key and --authority; or --plaintext-on-loopback with 127.0.0.1 to try it out",
    )

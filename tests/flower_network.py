"""A SuperLink and SuperNodes over TLS on loopback, in processes of their own, for a test."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """A new authority and a certificate of it for loopback: (authority, certificate, key) as PEM files."""
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]

    def certificate(subject: x509.Name, key: Any, authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only"), False
        )  # fmt: skip
        usage |= {"digital_signature": True, "key_cert_sign": authority, "crl_sign": authority}
        return builder.add_extension(x509.KeyUsage(**usage), critical=True).sign(authority_key, hashes.SHA256())

    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    pem = serialization.Encoding.PEM
    paths = (folder / "ca.pem", folder / "server.pem", folder / "server.key")
    paths[0].write_bytes(certificate(issuer, authority_key, True).public_bytes(pem))
    paths[1].write_bytes(certificate(subject, server_key, False).public_bytes(pem))
    paths[2].write_bytes(server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return paths


class Network:
    """One SuperLink; SuperNodes join it. Everything is killed at the end of a `with`."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.authority, self.certificate, self.key = certificates(folder)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.authority}"\n'
        )

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *details: object) -> None:
        for process in self.processes:
            self.kill(process)

    def spawn(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a program of Flower in a process group of its own; its output goes to `folder/<name>.log`."""
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [str(BIN / arguments[0]), *arguments[1:]],
                stdout=log, stderr=log, env=self.environment, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL to a program and all that it started, in whatever process group."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            for each in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait(10)

    def superlink(self) -> subprocess.Popen[bytes]:
        process = self.spawn(
            "superlink", "flower-superlink", "--port", str(self.port), "--database", str(self.folder / "state.db"),
            "--ssl-ca-certfile", str(self.authority), "--ssl-certfile", str(self.certificate),
            "--ssl-keyfile", str(self.key), "--disable-runtime-dependency-installation",
        )  # fmt: skip
        wait_for(lambda: _listens(self.port), 60, "the SuperLink to listen")
        return process

    def supernode(self, name: str, node_config: str) -> subprocess.Popen[bytes]:
        return self.spawn(
            name, "flower-supernode", "--superlink", f"127.0.0.1:{self.port}",
            "--root-certificates", str(self.authority), "--port", str(free_port()),
            "--ssl-certfile", str(self.certificate), "--ssl-keyfile", str(self.key),
            "--ssl-ca-certfile", str(self.authority), "--node-config", node_config,
        )  # fmt: skip

    def flwr(self, *arguments: str) -> str:
        """Runs the `flwr` command and returns what it prints."""
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments], capture_output=True, text=True, env=self.environment, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


def wait_for(condition: Any, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

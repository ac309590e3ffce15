"""Customer and vendor as two processes. Each has its own run folder, and goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sotto.config import Config
from sotto.data.load import has_eval
from sotto.errors import SottoError
from sotto.rundir import RunDir, require_writable
from sotto.split import network
from sotto.split.cache import ABOUT, write_private
from sotto.split.customer import Customer, load_bottom, setting_of
from sotto.split.network import Certificates
from sotto.split.protocol import CustomerSession, VendorService
from sotto.split.simulate import answer_book, create, evaluate, noise_for, to_go_on, write_statement
from sotto.split.vendor import Vendor
from sotto.split.watch import Watch

SENT = "sent.txt"


def _role(config: Config, role: str) -> None:
    if setting_of(config).role not in (None, role):
        raise SottoError(
            "SOT805", what=f"this is the configuration of the {setting_of(config).role}", where="setting.role",
            why=f"'sotto split {role}' was called with it", fix=f"call 'sotto split {setting_of(config).role}'",
        )  # fmt: skip


def _folder(config: Config, stem: str, resume: Path | None, role: str) -> RunDir:
    run = RunDir.planned(config, stem) if resume is None else RunDir(resume)
    to_go_on(run, role)
    return run


def _first_release(run: RunDir) -> None:
    """Notes that the texts of this run leave now; refuses where they have left from another run beside it.

    Raises:
      SottoError: SOT830.
    """
    data = json.loads((run.path / "private" / "outbox" / ABOUT).read_text())["data"]
    for note in sorted(run.path.parent.glob(f"*/private/{SENT}")):
        if note.read_text() == data and note.parent.parent != run.path:
            raise SottoError(
                "SOT830", what="these texts have been sent before", where=str(note.parent.parent),
                why="a second release has noise of its own, and two tell more of a text than either statement says",
                fix=f"go on with --resume {note.parent.parent}; or name another output.dir, if a second one is meant",
            )  # fmt: skip
    write_private(run.path / "private" / SENT, data.encode())


def vendor(
    config: Config,
    stem: str,
    listen: str,
    certificates: Certificates | None = None,
    plaintext: bool = False,
    resume: Path | None = None,
    ready: Callable[[Path, int], None] | None = None,
    stop: Callable[[], object] | None = None,
    watch: Watch | None = None,
) -> Path:
    """Serves one customer: takes its upload, trains, and scores its queries until it is stopped.

    Args:
      listen: HOST:PORT; port 0 chooses one.
      resume: a run folder to go on with.
      ready: called with the run folder and the port.
      stop: returns when the vendor shall stop; default: it serves until Ctrl-C.
      watch: is told what happens in between.

    Returns:
      the run folder.

    Raises:
      SottoError: SOT805, SOT827 to SOT829, and those of the vendor's own input.
    """
    _role(config, "vendor")
    network.check(listen, certificates, plaintext)
    network.require_flower()
    from sotto.split import superlink

    require_writable(config)
    run = _folder(config, stem, resume, "vendor")
    made = Vendor(config)
    if resume is None:
        create(run, config)
    with run.locked():
        service = VendorService(made, run, watch)
        with superlink.serve(service, listen, certificates, plaintext) as port:
            if ready is not None:
                ready(run.path, port)
            service.wait()
            if stop is not None:
                stop()
            else:
                _forever()
            service.watch.ended()
    return run.path


def _forever() -> None:
    import threading

    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return


def customer(
    config: Config,
    stem: str,
    address: str,
    certificates: Certificates | None = None,
    plaintext: bool = False,
    resume: Path | None = None,
    ready: Callable[[Path], None] | None = None,
) -> tuple[Path, float | None, str]:
    """Privatizes the data, sends it, stays until the vendor has trained, and asks for the scores of `data.eval`.

    Args:
      ready: called with the run folder before anything is sent.

    Returns:
      the run folder, the accuracy on `data.eval` (None without one), and the statement.

    Raises:
      SottoError: SOT805, SOT826 to SOT830, and those of the customer's own input.
    """
    _role(config, "customer")
    network.check(address, certificates, plaintext)
    network.require_flower()
    from sotto.split import supernode

    require_writable(config)
    run = _folder(config, stem, resume, "customer")
    bottom, tokenizer = load_bottom(config)
    made = Customer(config, bottom, tokenizer, noise_for(config))
    if resume is None:
        create(run, config)
    if ready is not None:
        ready(run.path)
    with run.locked():
        outbox = made.prepare(run.path / "private" / "outbox")
        book = answer_book(run, config, made)
        with supernode.connect(address, certificates, plaintext) as call:
            _first_release(run)
            session = CustomerSession(call, made.agreement)
            session.upload(outbox.manifest, outbox.read)
            session.train(book)
            accuracy = evaluate(made, session.query, run.path) if has_eval(config.data) else None
        words, _ = write_statement(run, config, made, accuracy)
    return run.path, accuracy, words

"""Customer and vendor as two processes. Each has its own run folder, and goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sotto.config import Config
from sotto.data.load import has_eval
from sotto.errors import SottoError
from sotto.rundir import RunDir, require_writable
from sotto.split import network
from sotto.split.answers import AnswerBook
from sotto.split.customer import Customer, load_bottom, setting_of
from sotto.split.network import Certificates
from sotto.split.protocol import CustomerSession, VendorService
from sotto.split.simulate import create, evaluate, label_keeper, noise_for, write_statement
from sotto.split.vendor import Vendor


def _role(config: Config, role: str) -> None:
    if setting_of(config).role not in (None, role):
        raise SottoError(
            "SOT805", what=f"this is the configuration of the {setting_of(config).role}", where="setting.role",
            why=f"'sotto split {role}' was called with it", fix=f"call 'sotto split {setting_of(config).role}'",
        )  # fmt: skip


def _run(config: Config, stem: str, resume: Path | None) -> RunDir:
    if resume is not None:
        return RunDir(resume)
    run = RunDir.planned(config, stem)
    create(run, config)
    return run


def vendor(
    config: Config,
    stem: str,
    listen: str,
    certificates: Certificates | None = None,
    plaintext: bool = False,
    resume: Path | None = None,
    ready: Callable[[Path, int], None] | None = None,
    stop: Callable[[], object] | None = None,
) -> Path:
    """Serves one customer: takes its upload, trains, and scores its queries until it is stopped.

    Args:
      listen: HOST:PORT; port 0 chooses one.
      resume: a run folder to go on with.
      ready: called with the run folder and the port.
      stop: returns when the vendor shall stop; default: it serves until Ctrl-C.

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
    made = Vendor(config)
    run = _run(config, stem, resume)
    with run.locked():
        service = VendorService(made, run)
        with superlink.serve(service, listen, certificates, plaintext) as port:
            if ready is not None:
                ready(run.path, port)
            service.wait()
            if stop is not None:
                stop()
            else:
                _forever()
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
      SottoError: SOT805, SOT826 to SOT829, and those of the customer's own input.
    """
    _role(config, "customer")
    network.check(address, certificates, plaintext)
    network.require_flower()
    from sotto.split import supernode

    require_writable(config)
    bottom, tokenizer = load_bottom(config)
    made = Customer(config, bottom, tokenizer, noise_for(config))
    run = _run(config, stem, resume)
    if ready is not None:
        ready(run.path)
    with run.locked():
        outbox = made.prepare(run.path / "private" / "outbox")
        book = None
        if setting_of(config).labels == "kept":
            classes = made.agreement.classes
            book = AnswerBook(run.path / "private" / "answers.bin", label_keeper(config, made), classes)
        with supernode.connect(address, certificates, plaintext) as call:
            session = CustomerSession(call, made.agreement)
            session.upload(outbox.manifest, outbox.read)
            session.train(book)
            accuracy = evaluate(made, session.query) if has_eval(config.data) else None
        words, _ = write_statement(run, config, made, accuracy)
    return run.path, accuracy, words

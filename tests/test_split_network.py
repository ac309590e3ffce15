"""Two sides and a connection: what is carried, who is let in, and what a break or a bad partner can do."""

from __future__ import annotations

import dataclasses
import datetime
import http.client
import io
import ipaddress
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_split_run
import tiny_runs
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console

import sotto
from sotto.errors import SottoError
from sotto.privacy.noise import DebugNoise
from sotto.rundir import RunDir
from sotto.split import cache, network, protocol, sides, superlink, supernode
from sotto.split.answers import HEAD, AnswerBook
from sotto.split.customer import Customer, load_bottom
from sotto.split.labels import LabelKeeper
from sotto.split.network import Certificates
from sotto.split.protocol import CustomerSession, VendorService
from sotto.split.queries import QueryBook
from sotto.split.simulate import evaluate, label_keeper, noise_for, simulate
from sotto.split.vendor import Vendor
from sotto.split.watch import OnScreen, Watch
from sotto.split.wire import Manifest

SETTING = {"privatizer": "dx_hidden", "eta": 30.0, "layer": 1}
SEGMENTS = {"privatizer": "dx_pooled", "segment": 3, "eta": 30.0, "layer": 1}
KEPT = {"privatizer": "none", "layer": 1, "labels": "kept", "label_epsilon": 5.0}
SEEDED = {"run": {"debug_noise_seed": 3, "checkpoint_every": 1}}


class Pair:
    """A vendor's service and a customer that is ready to send."""

    def __init__(self, folder: Path, setting: dict[str, Any] = SETTING):
        self.config = test_split_run.config(folder, setting, **SEEDED)
        self.run = RunDir(folder / "runs" / "vendor")
        self.run.create(self.config, {}, {})
        bottom, tokenizer = load_bottom(self.config)
        self.customer = Customer(self.config, bottom, tokenizer, noise_for(self.config))
        self.outbox = self.customer.prepare(folder / "outbox")
        self.restart()

    def restart(self) -> None:
        self.service = VendorService(Vendor(self.config), self.run)

    def session(self, call: protocol.Call | None = None) -> CustomerSession:
        return CustomerSession(call or self.service.call, self.customer.agreement)


def refused(action: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(SottoError) as caught:
        action(*arguments)
    return str(caught.value)


# ---- the protocol, over a function call


def test_the_protocol_gives_what_the_simulation_gives(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    expected = simulate(pair.config)
    session = pair.session()
    assert session.upload(pair.outbox.manifest, pair.outbox.read) == len(pair.outbox.manifest.pieces) > 2
    session.train(None)
    tiny_runs.assert_same(dict(pair.service.vendor.top.state_dict()), dict(expected.vendor.top.state_dict()))
    assert evaluate(pair.customer, session.query, pair.run.path) == expected.accuracy


def test_sides_with_other_segments_do_not_agree(tmp_path: Path) -> None:
    """Also where equally many rows leave: the vendor would place them wrongly."""
    pair = Pair(tmp_path, SEGMENTS)
    manifest = dataclasses.replace(
        pair.outbox.manifest, agreement=dataclasses.replace(pair.customer.agreement, segment=4)
    )
    with pytest.raises(SottoError) as caught:
        Manifest.from_json(manifest.to_json(), pair.customer.agreement)
    assert caught.value.code == "SOT820"
    assert "segment" in str(caught.value)
    assert Manifest.from_json(pair.outbox.manifest.to_json(), pair.customer.agreement) == pair.outbox.manifest
    assert pair.customer.agreement.max_rows == 16 // 3


def test_labels_that_are_kept_are_learnt_from_over_the_protocol(tmp_path: Path) -> None:
    pair = Pair(tmp_path, KEPT)
    expected = simulate(pair.config)
    session = pair.session()
    session.upload(pair.outbox.manifest, pair.outbox.read)
    book = AnswerBook(tmp_path / "answers.bin", label_keeper(pair.config, pair.customer), 3)
    session.train(book)
    tiny_runs.assert_same(dict(pair.service.vendor.top.state_dict()), dict(expected.vendor.top.state_dict()))


@pytest.mark.parametrize("setting", [SETTING, SEGMENTS])
def test_the_wire_holds_no_text_no_tokens_and_no_seed(tmp_path: Path, setting: dict) -> None:
    pair, carried = Pair(tmp_path, setting), []

    def watch(method: str, request: bytes) -> bytes:
        reply = pair.service.call(method, request)
        carried.append(method.encode() + request + reply)
        return reply

    session = pair.session(watch)
    session.upload(pair.outbox.manifest, pair.outbox.read)
    session.train(None)
    evaluate(pair.customer, session.query, pair.run.path)
    wire = b"".join(carried)
    examples = pair.customer.data.examples
    assert tiny_runs.CANARY.encode() not in wire
    for e in range(len(examples)):
        ids = examples.input_ids[examples.offsets[e] : examples.offsets[e + 1]]
        assert all(ids.astype(kind).tobytes() not in wire for kind in ("<i2", "<i4", "<i8"))
    assert b"seed" not in wire
    assert b"w40" not in wire
    plain = [bytes(row) for row in pair.customer.bottom.table_Vn.half().numpy()]
    assert not any(row in wire for row in plain)


def test_an_upload_that_breaks_goes_on_and_sends_nothing_twice(tmp_path: Path) -> None:
    pair, sent = Pair(tmp_path), []

    def breaks(method: str, request: bytes) -> bytes:
        if method == "piece":
            sent.append(request[16:20])
            if len(sent) == 3:
                raise ConnectionError
        return pair.service.call(method, request)

    with pytest.raises(ConnectionError):
        pair.session(breaks).upload(pair.outbox.manifest, pair.outbox.read)
    pair.restart()  # the vendor dies as well
    assert pair.session().upload(pair.outbox.manifest, pair.outbox.read) == len(pair.outbox.manifest.pieces) - 2


def test_whoever_connects_again_ends_the_session_before(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    first, second = pair.session(), pair.session()
    text = pair.outbox.manifest.to_json().encode()
    for session in (first, second):
        session.ticket = session._ask("hello", text)[:16]
    piece = (0).to_bytes(4, "little") + pair.outbox.read(0)
    assert "SOT820" in refused(first._ask, "piece", first.ticket + piece)
    second._ask("piece", second.ticket + piece)
    assert "SOT821" in refused(second._ask, "piece", second.ticket + piece), "replayed"
    later = (2).to_bytes(4, "little") + pair.outbox.read(2)
    assert "SOT821" in refused(second._ask, "piece", second.ticket + later), "out of order"
    second.upload(pair.outbox.manifest, pair.outbox.read)
    assert pair.service.inbox is not None
    assert pair.service.inbox.complete, "nothing was lost"


def test_another_customer_is_refused(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.session().upload(pair.outbox.manifest, pair.outbox.read)
    other = Customer(pair.config, pair.customer.bottom, pair.customer.tokenizer, DebugNoise(9)).prepare(tmp_path / "o")
    assert "SOT820" in refused(pair.session().upload, other.manifest, other.read)


@pytest.mark.parametrize("method", ["hello", "piece", "step", "query", "gradients", "../hello", ""])
@pytest.mark.parametrize("request_", [b"", b"\xff" * 40, b"SECRET" * 20, b"0" * 16 + b"\xff\xff\xff\xff"])
def test_garbage_is_refused_in_words_that_quote_nothing(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, method: str, request_: bytes
) -> None:
    service = garbage_service(tmp_path_factory)
    reply = service.call(method, request_)
    assert reply[:4] == b"\1SOT"
    assert len(reply) == 7
    assert "SECRET" not in caplog.text
    assert service.inbox is None


SERVICES: list[VendorService] = []


def garbage_service(factory: pytest.TempPathFactory) -> VendorService:
    if not SERVICES:
        SERVICES.append(Pair(factory.mktemp("garbage")).service)
    return SERVICES[0]


def test_garbage_in_a_session_is_refused_too(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    session = pair.session()
    session.ticket = session._ask("hello", pair.outbox.manifest.to_json().encode())[:16]
    for method, body in [("piece", b""), ("piece", b"\0\0\0\0"), ("piece", b"\xff" * 99), ("query", b"{}"),
                         ("step", b"x" * 12), ("piece", b"\0" * (pair.service.most_bytes + 1))]:  # fmt: skip
        assert "SOT826" in refused(session._ask, method, session.ticket + body)
    session.upload(pair.outbox.manifest, pair.outbox.read)
    session.train(None)
    for body in (b"", b"\xff" * 8, b"\2\0\0\0{}", b"\2\0\0\0[]" + b"x" * 99):
        assert "SOT826" in refused(session._ask, "query", session.ticket + body)


@pytest.mark.parametrize(
    "asked",
    [
        b"G" + b"\0" * 16,
        b"S",
        b"S" + b"\0" * 15,
        b"S" + np.array([0, np.nan, 0, 0], dtype=np.float32).tobytes(),
        b"",
        b"bottom",
    ],
)
def test_a_vendor_that_asks_for_anything_else_gets_nothing(tmp_path: Path, asked: bytes) -> None:
    kept = LabelKeeper(torch.zeros(5, dtype=torch.int64), 3, 1, 2.0, 1e-5, DebugNoise(0))
    book = AnswerBook(tmp_path / "answers.bin", kept, 3)
    agreed = Pair.__new__(Pair)
    made = test_split_run.config(tmp_path, KEPT)
    bottom, tokenizer = load_bottom(made)
    agreed.customer = Customer(made, bottom, tokenizer, DebugNoise(0))
    calls = iter([b"\0" + asked])
    session = CustomerSession(lambda method, request: next(calls), agreed.customer.agreement)
    assert "SOT801" in refused(session.train, book)
    assert kept.answers == 0
    assert (tmp_path / "answers.bin").stat().st_size == HEAD.size, "no answer stands in it"


def test_a_refusal_of_the_vendor_is_not_believed_word_by_word(tmp_path: Path) -> None:
    made = test_split_run.config(tmp_path)
    bottom, tokenizer = load_bottom(made)
    agreed = Customer(made, bottom, tokenizer, DebugNoise(0)).agreement
    for reply in (b"\1SOT821", b"\1<script>", b"\1", b""):
        text = refused(CustomerSession(lambda m, r, reply=reply: reply, agreed)._ask, "piece", b"")
        assert "SOT826" in text
        assert "script" not in text


# ---- answers survive a crash


def keeper(uses: int = 2) -> LabelKeeper:
    return LabelKeeper(torch.arange(6) % 3, 3, uses, 2.0, 1e-5, DebugNoise(1))


def test_a_restart_forgets_no_answer_and_repeats_none(tmp_path: Path) -> None:
    path, scores = tmp_path / "answers.bin", torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    some = torch.tensor([0, 2, 4])
    first = AnswerBook(path, keeper(), 3).answer(some, scores)
    assert path.stat().st_mode & 0o077 == 0
    later = AnswerBook(path, keeper(), 3)
    assert torch.equal(later.answer(some, scores), first), "the same question, the same noise"
    assert not torch.equal(later.answer(some, scores + 1), first)
    assert "SOT801" in refused(AnswerBook(path, keeper(), 3).answer, some, scores + 2)


def test_a_torn_record_was_never_sent(tmp_path: Path) -> None:
    path, scores = tmp_path / "answers.bin", torch.zeros(2, 3)
    book = AnswerBook(path, keeper(1), 3)
    book.answer(torch.tensor([0, 1]), scores)
    whole = path.read_bytes()
    book.answer(torch.tensor([2, 3]), scores)
    for cut in (1, 35, len(path.read_bytes()) - len(whole) - 1):
        path.write_bytes(path.read_bytes()[: len(whole) + cut])
        again = AnswerBook(path, keeper(1), 3)
        assert path.read_bytes() == whole
        again.answer(torch.tensor([2, 3]), scores)
        assert "SOT801" in refused(again.answer, torch.tensor([0, 1]), scores + 1)


def test_a_book_that_was_begun_for_fewer_answers_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its answers had less noise, and more of them would cost more than the statement says."""
    path, scores, some = tmp_path / "answers.bin", torch.zeros(2, 3), torch.tensor([0, 1])
    AnswerBook(path, keeper(1), 3).answer(some, scores)
    whole = path.read_bytes()
    assert keeper(2).std > keeper(1).std
    for other in (keeper(2), LabelKeeper(torch.arange(6) % 3, 3, 1, 4.0, 1e-5, DebugNoise(1))):
        assert "SOT822" in refused(AnswerBook, path, other, 3)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:9])
    AnswerBook(path, keeper(1), 3).answer(some, scores)
    assert len(path.read_bytes()) == len(whole), "a torn head was written before any answer was sent"


def test_an_answer_that_cannot_be_stored_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, scores, some = tmp_path / "answers.bin", torch.zeros(2, 3), torch.tensor([0, 1])
    book = AnswerBook(path, keeper(1), 3)
    book.answer(torch.tensor([4, 5]), scores)
    whole = path.read_bytes()
    write, full = cache.os.write, iter([7])

    def short(descriptor: int, data: bytes) -> int:
        room = next(full, None)
        if room is None:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:room])

    monkeypatch.setattr(cache.os, "write", short)
    assert "SOT823" in refused(book.answer, some, scores)
    monkeypatch.undo()
    assert path.read_bytes() == whole, "no torn record that the next one would be read into"
    assert "SOT801" in refused(book.answer, some, scores), "it counts, though nobody has it"
    assert "SOT801" in refused(AnswerBook(path, keeper(1), 3).answer, torch.tensor([4, 5]), scores + 1)
    AnswerBook(path, keeper(1), 3).answer(some, scores)


# ---- a text that is asked about again


def test_a_query_is_drawn_once_however_often_it_is_asked(tmp_path: Path) -> None:
    pair, carried = Pair(tmp_path), []

    def watch(method: str, request: bytes) -> bytes:
        if method == "query":
            carried.append(request[protocol.TICKET :])
        return pair.service.call(method, request)

    session = pair.session(watch)
    session.upload(pair.outbox.manifest, pair.outbox.read)
    session.train(None)
    first = evaluate(pair.customer, session.query, pair.run.path)
    assert evaluate(pair.customer, session.query, pair.run.path) == first
    half = len(carried) // 2
    assert carried[:half] == carried[half:], "the same bytes, not fresh noise to average"
    evaluate(pair.customer, session.query, tmp_path / "runs" / "vendor")
    examples, chosen = pair.customer.data.examples, np.array([3, 1, 3])
    once, again = (pair.customer.query(examples, chosen).values for _ in range(2))
    assert not np.array_equal(once, again), "it is the book that draws once"


@pytest.mark.parametrize(
    "setting",
    [
        SETTING,
        SEGMENTS,
        {"privatizer": "dx_tokens", "eta": 5.0},
        {"privatizer": "gaussian_pooled", "epsilon": 1.0, "layer": 1},
    ],
)
def test_the_book_of_queries_survives_a_crash(tmp_path: Path, setting: dict) -> None:
    pair = Pair(tmp_path, setting)
    examples, draw = pair.customer.data.examples, pair.customer.query
    path, agreed = tmp_path / "queries.bin", pair.customer.agreement
    book, chosen = QueryBook(path, agreed), np.array([5, 0, 5, 9])
    first = book.take(examples, chosen, draw)
    assert path.stat().st_mode & 0o077 == 0
    parts = np.split(first.values, np.cumsum(first.lengths_E)[:-1])
    assert np.array_equal(parts[0], parts[2]), "the same text twice is drawn once"
    fresh = draw(examples, chosen)
    assert np.array_equal(fresh.lengths_E, first.lengths_E)
    assert fresh.values.dtype == first.values.dtype
    whole = path.read_bytes()
    path.write_bytes(whole + b"torn" * 20)
    later = QueryBook(path, agreed)
    assert path.read_bytes() == whole
    mixed = later.take(examples, np.array([0, 7, 5]), draw)
    again = np.split(mixed.values, np.cumsum(mixed.lengths_E)[:-1])
    assert np.array_equal(again[0], parts[1])
    assert np.array_equal(again[2], parts[0])
    assert np.array_equal(QueryBook(path, agreed).take(examples, np.array([7]), draw).values, again[1])


def test_a_second_customer_with_the_same_texts_is_not_started_by_mistake(tmp_path: Path) -> None:
    made = test_split_run.config(tmp_path, SETTING, **SEEDED)
    with vendor_running(made, None) as (port, _):
        address = f"127.0.0.1:{port}"
        path, accuracy, _ = sides.customer(made, "customer", address, None, True)
        text = refused(sides.customer, made, "customer", address, None, True)
        assert "SOT830" in text
        assert str(path) in text
        assert sides.customer(made, "customer", address, None, True, resume=path)[1] == accuracy
    other = test_split_run.config(tmp_path, SETTING, **SEEDED, output={"dir": str(tmp_path / "meant")})
    with vendor_running(other, None) as (port, _):
        sides.customer(other, "customer", f"127.0.0.1:{port}", None, True)


# ---- what the vendor's user sees


def test_a_vendor_tells_its_user_what_happens_and_its_folder_is_finished(tmp_path: Path) -> None:
    made, said = test_split_run.config(tmp_path, SETTING), io.StringIO()
    with vendor_running(made, None, watch=OnScreen(Console(file=said, width=60))) as (port, path):
        (listed,) = sotto.ls(tmp_path / "runs")
        assert (listed["state"], listed["step"], listed["steps"]) == ("unfinished", 0, 18)
        assert "--resume" in sotto.show(path)
        assert not said.getvalue()
        mine, _, _ = sides.customer(made, "customer", f"127.0.0.1:{port}", None, True)
        sides.customer(made, "customer", f"127.0.0.1:{port}", None, True, resume=mine)
    lines, count = said.getvalue().splitlines(), len(tiny_runs.rows())
    assert lines[0] == (
        f"a customer is connected: {count} texts in 4 pieces, of which 0 are here; cut above 1 block, labels sent; "
        "agreed on, 18 steps of 20 texts"
    )
    assert re.fullmatch(r"the upload is here: training [\d,]+ parameters for 18 steps -> .*", lines[1])
    assert lines[1].endswith(str(path))
    assert lines[2] == "trained: 18 of 18 steps. Queries are answered until Ctrl-C"
    assert lines[3] == "the customer asks for scores"
    assert lines[4] == "the customer is connected again: 4 of 4 pieces are here"
    assert lines[5:] == [f"ended; {2 * count} texts were scored"]
    found = {run["run"]: (run["state"], run["step"], run["steps"]) for run in sotto.ls(tmp_path / "runs")}
    assert found == {str(path): ("finished", 18, 18), str(mine): ("finished", 18, 18)}
    assert sotto.show(path).startswith("The vendor's side, trained for 18 steps.")
    assert tiny_runs.CANARY not in said.getvalue()


def test_a_terminal_gets_a_bar_that_is_taken_away_when_training_fails(tmp_path: Path) -> None:
    pair, said = Pair(tmp_path), io.StringIO()
    screen = OnScreen(Console(file=said, width=80, force_terminal=True))
    pair.service.watch = screen
    steps: list[int] = []

    def fails(step: int) -> None:
        OnScreen.stepped(screen, step)
        steps.append(step)
        if step == 3:
            raise OSError(28, "No space left on device")

    screen.stepped = fails  # type: ignore[method-assign]
    session = pair.session()
    session.upload(pair.outbox.manifest, pair.outbox.read)
    assert "SOT826" in refused(session.train, None)
    with pytest.raises(OSError, match="No space"):
        pair.service.wait()
    assert steps == [1, 2, 3]
    assert screen._bar.tasks[0].completed == 3
    assert screen._bar.finished is False
    assert not screen._bar.live.is_started
    assert "trained:" not in said.getvalue()


# ---- the connection itself


def certificate(folder: Path, name: str, signer: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """(certificate, key), signed by another or by itself; both are written as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer, signing = (signer[0].subject, signer[1]) if signer else (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=9))
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(signing, hashes.SHA256())
    )  # fmt: skip
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / f"{name}.pem").write_bytes(built.public_bytes(pem))
    (folder / f"{name}.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return built, key


def files(folder: Path, name: str, authority: str = "authority") -> Certificates:
    return Certificates(folder / f"{name}.pem", folder / f"{name}.key", folder / f"{authority}.pem")


@contextmanager
def vendor_running(
    made: Any, certificates: Certificates | None, resume: Path | None = None, watch: Watch | None = None
) -> Iterator[tuple[int, Path]]:
    """A vendor in a thread."""
    up, over, found, plaintext = threading.Event(), threading.Event(), [], certificates is None

    def ready(path: Path, port: int) -> None:
        found.append((port, path))
        up.set()

    def work() -> None:
        sides.vendor(made, "vendor", "127.0.0.1:0", certificates, plaintext, resume, ready, over.wait, watch)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert up.wait(60)
    try:
        yield found[0]
    finally:
        over.set()
        thread.join(60)


def test_two_sides_over_mutual_tls(tmp_path: Path) -> None:
    signer = certificate(tmp_path, "authority")
    certificate(tmp_path, "vendor", signer)
    certificate(tmp_path, "customer", signer)
    certificate(tmp_path, "stranger")
    made = test_split_run.config(tmp_path, SETTING, **SEEDED)
    expected = simulate(made)
    with vendor_running(made, files(tmp_path, "vendor")) as (port, _):
        address = f"127.0.0.1:{port}"
        for wrong in (files(tmp_path, "stranger"), files(tmp_path, "customer", "stranger")):
            assert "SOT829" in refused(sides.customer, made, "stranger", address, wrong)
        path, accuracy, words = sides.customer(made, "customer", address, files(tmp_path, "customer"))
    assert accuracy == expected.accuracy
    assert words == expected.statement
    assert (path / "statement.txt").read_text() == words


def test_both_sides_stop_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = test_split_run.config(tmp_path, SETTING, **SEEDED)
    expected = simulate(made)
    runs: list[Path] = []
    original, count = CustomerSession._ask, iter(range(1000))

    def breaks(self: CustomerSession, method: str, request: bytes) -> bytes:
        if method == "piece" and next(count) == 1:
            raise KeyboardInterrupt
        return original(self, method, request)

    monkeypatch.setattr(CustomerSession, "_ask", breaks)
    service = VendorService(Vendor(made), RunDir(tmp_path / "runs" / "first"))
    service.run.create(made, {"kind": "split"}, {})
    with superlink.serve(service, "127.0.0.1:0", None, True) as port, pytest.raises(KeyboardInterrupt):
        sides.customer(made, "customer", f"127.0.0.1:{port}", None, True, ready=runs.append)
    with vendor_running(made, None, service.run.path) as (port, path):
        assert path == service.run.path
        _, accuracy, _ = sides.customer(made, "customer", f"127.0.0.1:{port}", None, True, resume=runs[0])
    assert accuracy == expected.accuracy


def test_an_oversized_message_is_refused_unread(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    seen: list[int] = []
    call = pair.service.call
    pair.service.call = lambda method, request: seen.append(len(request)) or call(method, request)  # type: ignore[method-assign]
    most = pair.service.most_bytes
    with superlink.serve(pair.service, "127.0.0.1:0", None, True) as port:
        with supernode.connect(f"127.0.0.1:{port}", None, True) as ask:
            assert ask("hello", b"x" * (most + 1)) == b"\1SOT820"
            assert not seen
            # Not of one byte: Flower sends a record once that comes twice.
            assert "SOT829" in refused(ask, "hello", random.Random(0).randbytes(2 * most + superlink.OVERHEAD))
            assert not seen
        with supernode.connect(f"127.0.0.1:{port}", None, True) as ask:
            assert ask("hello", b"x")[:4] == b"\1SOT", "and the vendor goes on"
        assert "SOT829" in refused(lambda: superlink.serve(pair.service, f"127.0.0.1:{port}", None, True).__enter__())
    assert "SOT829" in refused(lambda: supernode.connect(f"127.0.0.1:{port}", None, True).__enter__())


def test_a_customer_that_connects_twice_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with superlink.serve(pair.service, "127.0.0.1:0", None, True) as port:
        address = f"127.0.0.1:{port}"
        with supernode.connect(address, None, True) as ask:
            session = pair.session(ask)
            session.ticket = session._ask("hello", pair.outbox.manifest.to_json().encode())[:16]
            text = refused(lambda: supernode.connect(address, None, True, patience=0.0).__enter__())
            assert "SOT829" in text
            assert "another customer is connected" in text
            session.upload(pair.outbox.manifest, pair.outbox.read)
        with supernode.connect(address, None, True, patience=0.0) as ask:
            assert pair.session(ask).upload(pair.outbox.manifest, pair.outbox.read) == 0, "nothing was lost"


@pytest.mark.parametrize(
    ("path", "method", "headers", "status"),
    [
        ("/v1/control/start-run", "POST", {}, 404),
        ("/v1/control/register-node", "POST", {}, 404),
        ("/v1/runtime/push-messages", "POST", {}, 404),
        ("/v1/fleet/get-fab", "POST", {}, 404),
        ("/v1/fleet/../control/start-run", "POST", {}, 404),
        ("/v1/fleet/%2e%2e/control/start-run", "POST", {}, 404),
        ("/docs", "GET", {}, 404),
        ("/openapi.json", "GET", {}, 404),
        ("/health", "GET", {}, 404),
        ("/v1/fleet/pull-messages", "GET", {}, 404),
        ("/v1/fleet/push-object", "POST", {"Content-Length": str(superlink.BODY + 1)}, 413),
        ("/v1/fleet/push-object", "POST", {"Content-Length": "9" * 40}, 400),
        ("/v1/fleet/push-object", "POST", {"Transfer-Encoding": "chunked"}, 413),
        ("/v1/fleet/push-object", "POST", {"Content-Length": "0", "Content-Type": "application/protobuf"}, 401),
        ("/v1/fleet/pull-messages", "POST", {"Content-Length": "0", "Content-Type": "application/protobuf"}, 401),
    ],
)
def test_the_gate_lets_the_calls_of_a_node_through_and_nothing_else(
    gate: int, path: str, method: str, headers: dict[str, str], status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gate, timeout=20)
    connection.putrequest(method, path)
    for name, value in headers.items() or [("Content-Length", "0")]:
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with superlink.serve(Pair(tmp_path_factory.mktemp("gate")).service, "127.0.0.1:0", None, True) as port:
        yield port


@pytest.mark.parametrize(
    ("address", "protected", "plaintext"),
    [
        ("192.0.2.1:9443", False, True),
        ("127.0.0.1:9443", False, False),
        ("vendor.example:9443", False, False),
        ("127.0.0.1:9443", True, True),
        ("127.0.0.1", True, False),
        (":9443", True, False),
        ("0.0.0.0:9443", False, True),
    ],
)
def test_unprotected_connections_are_refused(tmp_path: Path, address: str, protected: bool, plaintext: bool) -> None:
    certificates = files(tmp_path, "x") if protected else None
    assert "SOT827" in refused(network.check, address, certificates, plaintext)


def test_certificates_are_opened_before_any_text_is_read(tmp_path: Path) -> None:
    made = test_split_run.config(tmp_path, SETTING)
    assert "SOT827" in refused(sides.customer, made, "x", "127.0.0.1:1", files(tmp_path, "x"), False)
    assert not (tmp_path / "runs").exists()


def test_without_flower_both_sides_say_so_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = test_split_run.config(tmp_path, SETTING)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "SOT828" in refused(sides.customer, made, "x", "127.0.0.1:1", None, True)
    assert "SOT828" in refused(sides.vendor, made, "x", "127.0.0.1:0", None, True)
    assert not (tmp_path / "runs").exists()


def test_missing_certificates_and_wrong_roles_are_refused(tmp_path: Path) -> None:
    certificates = files(tmp_path, "x")
    assert "SOT827" in refused(lambda: supernode.connect("127.0.0.1:1", certificates, False).__enter__())
    for path in (certificates.certificate, certificates.private_key, certificates.authority):
        path.write_text("SECRET")
    for server in (True, False):
        text = refused(certificates.context, server)
        assert "SOT827" in text
        assert "SECRET" not in text
    made = test_split_run.config(tmp_path, {**SETTING, "role": "vendor"})
    assert "SOT805" in refused(sides.customer, made, "x", "127.0.0.1:1", None, True)
    made = test_split_run.config(tmp_path, {**SETTING, "role": "customer"})
    assert "SOT805" in refused(sides.vendor, made, "x", "127.0.0.1:0", None, True)

"""Customer and vendor as apps of Flower: in one process over Flower's messages, on loopback, and as two processes."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flower_network
import numpy as np
import psutil
import pytest
import test_split_network
import test_split_run
import tiny_runs
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from test_federated_flower import MemoryGrid
from test_split_network import KEPT, SEEDED, SETTING, Pair, refused, vendor_running

from sotto import config_file
from sotto.config import Config
from sotto.split import apps, sides, wire
from sotto.split.answers import AnswerBook
from sotto.split.apps import Answered, Asked, Courier, Desk, Ended
from sotto.split.simulate import evaluate, label_keeper, simulate
from sotto.split.wire import Agreement, Piece

NODE = 7


class OneNode(MemoryGrid):
    """Carries messages to the ClientApp in this process, as the bytes that Flower would send.

    Attributes:
      lose: numbers of messages that do not arrive, and of those whose reply does not.
    """

    def __init__(self, courier: Courier, lose: tuple[set[int], set[int]] = (set(), set())):
        self.app, self.lose = apps.client_app(courier), lose
        self.carried: list[bytes] = []
        self.uploaded, self.count, self.gone = 0, 0, False
        self.replies: dict[str, list[Message]] = {}

    def get_node_ids(self) -> list[int]:
        return [] if self.gone else [NODE]

    def push_messages(self, messages: Any) -> list[str]:
        (message,) = messages
        self.count += 1
        name = f"m{self.count}"
        message.metadata.__dict__["_message_id"] = name
        self._carry(message)
        self.replies[name] = [Message(error=_error(), reply_to=message)]
        if self.count in self.lose[0]:
            return [name]
        try:
            reply = self.app(message, Context(1, NODE, {}, RecordDict(), {}))
        except Ended:
            self.gone = True
            return [name]
        self.uploaded += self._carry(reply)
        if self.count not in self.lose[1]:
            self.replies[name] = [reply]
        return [name]

    def pull_messages(self, message_ids: Any) -> list[Message]:
        return [reply for name in message_ids for reply in self.replies.pop(name, [])]

    def _carry(self, message: Message) -> int:
        objects = [each.deflate() for each in get_all_nested_objects(message).values()]
        self.carried += objects
        return sum(len(each) for each in objects)


def _error() -> Any:
    from flwr.app import Error

    return Error(0, "lost")


@pytest.fixture(autouse=True)
def in_an_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apps, "IDLE", 0.001)
    for name in ("_run_id", "_node_id", "_task_id"):  # which Flower sets in the process of an app
        monkeypatch.setattr(TaskIdentity, name, 1)


@contextlib.contextmanager
def apps_running(call: Any, most: int, **lose: Any) -> Iterator[tuple[Courier, OneNode]]:
    """The vendor's app in a thread, and a customer that asks it."""
    courier, stop = Courier(), threading.Event()
    grid = OneNode(courier, **lose)
    app = apps.server_app(Desk(call, most), stop)
    thread = threading.Thread(target=app, args=(grid, Context(1, 1, {}, RecordDict(), {})), daemon=True)
    thread.start()
    try:
        yield courier, grid
    finally:
        courier.end()
        stop.set()
        thread.join(20)


# ---- the apps, over Flower's messages in this process


def test_a_whole_run_over_messages_gives_what_the_simulation_gives(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    expected = simulate(pair.config)
    with apps_running(pair.service.call, pair.service.most_bytes) as (courier, grid):
        session = pair.session(courier.call)
        assert session.upload(pair.outbox.manifest, pair.outbox.read) == len(pair.outbox.manifest.pieces) > 2
        session.train(None)
        assert evaluate(pair.customer, session.query, pair.run.path) == expected.accuracy
    tiny_runs.assert_same(dict(pair.service.vendor.top.state_dict()), dict(expected.vendor.top.state_dict()))
    holds_nothing_private(b"".join(grid.carried), pair, tmp_path)


def holds_nothing_private(carried: bytes, pair: Pair, folder: Path) -> None:
    examples = pair.customer.data.examples
    assert len(carried) > 10_000
    assert tiny_runs.CANARY.encode() not in carried
    for e in range(len(examples)):
        ids = examples.input_ids[examples.offsets[e] : examples.offsets[e + 1]]
        assert all(ids.astype(kind).tobytes() not in carried for kind in ("<i2", "<i4", "<i8"))
    for word in (b"seed", b" w40 ", str(folder).encode(), b"notes.csv", b"recipe"):
        assert word not in carried
    assert not any(bytes(row) in carried for row in pair.customer.bottom.table_Vn.half().numpy())


@pytest.mark.parametrize("which", [0, 1], ids=["messages", "replies"])
def test_what_is_lost_on_the_way_is_asked_again_and_done_once(which: int) -> None:
    done: list[bytes] = []

    def call(method: str, request: bytes) -> bytes:
        done.append(request)
        return b"answer to " + request

    lose = [set(), set()]
    lose[which] = {1, 3, 4, 7}
    with apps_running(call, 1 << 20, lose=tuple(lose)) as (courier, grid):
        for i in range(6):
            assert courier.call("piece", b"%d" % i) == b"answer to %d" % i
    assert done == [b"%d" % i for i in range(6)]
    assert grid.count > 10


def test_answers_about_kept_labels_are_given_once_though_messages_are_lost(tmp_path: Path) -> None:
    pair = Pair(tmp_path, KEPT)
    expected = simulate(pair.config)
    keeper = label_keeper(pair.config, pair.customer)
    with apps_running(pair.service.call, pair.service.most_bytes, lose=({4, 9}, {6, 11, 12})) as (courier, _):
        session = pair.session(courier.call)
        session.upload(pair.outbox.manifest, pair.outbox.read)
        session.train(AnswerBook(tmp_path / "answers.bin", keeper, 3))
    tiny_runs.assert_same(dict(pair.service.vendor.top.state_dict()), dict(expected.vendor.top.state_dict()))


@pytest.mark.parametrize(("values", "labels"), [("float16", "sent"), ("ids", "kept")])
def test_an_upload_is_within_five_percent_of_its_tensors(values: Any, labels: Any) -> None:
    """Every object that Flower makes of the replies, for pieces of the default size at the width of MiniLM."""
    agreement = Agreement("0" * 64, 2, 384, values, 30522, 3, labels, 1, 128)
    pieces, tensors, generator = [], 0, np.random.default_rng(0)
    for _ in range(3):
        lengths = generator.integers(8, 40, 512).astype(np.int32)
        rows = int(lengths.sum())
        sent = generator.integers(0, 30522, rows).astype(np.int32)
        if values == "float16":
            sent = generator.standard_normal((rows, 384)).astype(np.float16)
        tensors += sent.nbytes
        pieces.append(wire.encode(Piece(lengths, None if labels == "kept" else lengths % 3, sent)))
    assert sum(map(len, pieces)) == tensors + 3 * 512 * (4 if labels == "kept" else 8)
    if values == "ids":
        tensors = sum(map(len, pieces))  # a text of 20 ids is 80 bytes; that it has 20 takes 4
    got: list[bytes] = []

    def call(method: str, request: bytes) -> bytes:
        got.append(request)
        return b"\0"

    with apps_running(call, agreement.piece_bytes(512, 512 * 128)) as (courier, grid):
        for piece in pieces:
            courier.call("piece", piece)
    assert got == pieces
    assert tensors <= grid.uploaded <= 1.05 * tensors


# ---- messages of strangers


def asked(**changes: Any) -> RecordDict:
    facts = {"name": b"n" * 16, "number": 1, "method": "piece", "bytes": b"SECRET", **changes}
    return RecordDict({"0": ConfigRecord({k: v for k, v in facts.items() if v is not None})})


BAD = {
    "nothing": RecordDict({}),
    "arrays": RecordDict({"0": ArrayRecord({"0": Array(np.zeros(3, dtype=np.float32))})}),
    "metrics": RecordDict({"0": MetricRecord({"number": 1})}),
    "another name": RecordDict({"body": asked()["0"]}),
    "a hole": RecordDict({"0": asked()["0"], "2": ConfigRecord({"bytes": b""})}),
    "a second head": RecordDict({"0": asked()["0"], "1": asked()["0"]}),
    "text for bytes": RecordDict({"0": asked()["0"], "1": ConfigRecord({"bytes": "SECRET"})}),
    "lists": asked(bytes=[b"SECRET"]),
    "no bytes": asked(bytes=None),
    "more than agreed": asked(path="SECRET"),
    "another method": asked(method="train"),
    "a path": asked(method="../hello"),
    "number 0": asked(number=0),
    "negative": asked(number=-3),
    "true for 1": asked(number=True),
    "a fraction": asked(number=1.0),
    "a long name": asked(name=b"n" * 17),
    "too large": RecordDict({"0": asked()["0"], "1": ConfigRecord({"bytes": b"SECRET" * 9})}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_message_of_another_kind_is_refused_before_it_is_put_together(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert "SOT820" in refused(apps.read_asked, BAD[name], 50)
    desk = Desk(lambda method, request: pytest.fail("it was called"), 50)
    assert desk.answer(BAD[name]).body == b"\1SOT820"
    assert "SECRET" not in caplog.text


def objects_of(content: RecordDict) -> tuple[str, dict[str, bytes]]:
    message = Message(content, NODE, "query.split")
    return message.object_id, {name: each.deflate() for name, each in get_all_nested_objects(message).items()}


def test_an_array_that_names_one_piece_a_million_times_is_not_put_together() -> None:
    def repeated(times: int) -> tuple[str, dict[str, bytes]]:
        name, objects = objects_of(RecordDict({"0": ArrayRecord({"0": Array(np.zeros(1 << 16))})}))
        (array,) = (each for each, content in objects.items() if content.startswith(b"Array "))
        head, _, body = objects[array].partition(b"\0")
        body = body.replace(b"[0]", b"[" + b"0, " * (times - 1) + b"0]")
        kind, children, _ = head.split(b" ")
        objects[array] = b" ".join([kind, children, str(len(body)).encode()]) + b"\0" + body
        return name, objects

    grown: Any = inflate_object_from_contents(*repeated(5))
    assert len(grown.content["0"]["0"].data) > 5 * 8 * (1 << 16), "Flower would do it"
    assert "SOT820" in refused(apps.whole, *repeated(1_000_000))


def test_objects_that_are_no_message_are_refused() -> None:
    name, objects = objects_of(asked())
    assert apps.read_asked(apps.whole(name, dict(objects)).content, 6).body == b"SECRET"
    for broken in (
        {},
        {name: b""},
        {name: objects[name]},
        {**objects, name: b"SECRET"},
        {**objects, name: objects[name][:-3]},
        {each: content.replace(b"Message", b"Massage") for each, content in objects.items()},
    ):
        assert "SOT820" in refused(apps.whole, name, dict(broken))
    record = next(each for each, content in objects.items() if content.startswith(b"ConfigRecord"))
    assert "SOT820" in refused(apps.whole, record, dict(objects))


def test_the_vendor_goes_on_when_a_message_cannot_be_read() -> None:
    courier, stop, failed = Courier(), threading.Event(), []

    class Broken(OneNode):
        def pull_messages(self, message_ids: Any) -> list[Message]:
            if self.count == 2 and not failed:
                failed.append(True)
                raise KeyError("SECRET")
            return super().pull_messages(message_ids)

    app = apps.server_app(Desk(lambda method, request: b"fine", 99), stop)
    arguments = (Broken(courier), Context(1, 1, {}, RecordDict(), {}))
    thread = threading.Thread(target=app, args=arguments, daemon=True)
    thread.start()
    assert [courier.call("step", b"") for _ in range(3)] == [b"fine"] * 3
    assert failed
    courier.end()
    stop.set()
    thread.join(20)


def test_what_goes_wrong_at_the_vendor_reaches_the_customer_without_a_word_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(method: str, request: bytes) -> bytes:
        if method == "piece":
            raise OSError("SECRET")
        return b"\0fine"

    with apps_running(fails, 99) as (courier, grid):
        assert courier.call("piece", b"") == b"\1"
        assert courier.call("step", b"") == b"\0fine", "and it goes on"
    assert b"SECRET" not in b"".join(grid.carried)
    assert "SECRET" not in caplog.text


def test_a_call_of_the_largest_size_is_taken() -> None:
    assert apps.read_asked(asked(), 6) == Asked(b"n" * 16, 1, "piece", b"SECRET")
    assert "SOT820" in refused(apps.read_asked, asked(), 5)


@pytest.mark.parametrize("size", [0, 1, apps.PART - 1, apps.PART, apps.PART + 1, 2 * apps.PART + 7])
def test_bytes_arrive_as_they_were(size: int) -> None:
    body = np.random.default_rng(size).bytes(size)
    call, answer = Asked(b"m" * 16, 3, "query", body), Answered(3, body)
    assert apps.read_asked(apps.asked_content(call), size) == call
    assert apps.read_answered(apps.answered_content(answer)) == answer


@pytest.mark.parametrize("content", [RecordDict({}), asked(), RecordDict({"0": ConfigRecord({"bytes": b"x"})})])
def test_a_customer_takes_no_other_message_and_runs_nothing_for_it(content: RecordDict) -> None:
    app = apps.client_app(Courier())
    at = Context(1, NODE, {}, RecordDict(), {})
    assert "SOT820" in refused(app, Message(content, NODE, "query.split"), at)
    for kind in ("train", "evaluate", "query", "query.hello"):
        with pytest.raises(ValueError, match="function registered with name"):
            app(Message(content, NODE, kind), at)


def test_whoever_waits_for_an_answer_learns_that_the_connection_broke() -> None:
    courier = Courier()
    threading.Timer(0.05, courier.fail, [ConnectionError("gone")]).start()
    for _ in range(2):
        with pytest.raises(ConnectionError):
            courier.call("step", b"")


# ---- on loopback


class Tap:
    """Forwards connections to a port, and keeps what passes."""

    def __init__(self, port: int):
        self.seen, self._target = bytearray(), port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                inside, _ = self._socket.accept()
                self._threads.append(threading.Thread(target=self._forward, args=(inside,)))
                self._threads[-1].start()

    def _forward(self, inside: socket.socket) -> None:
        with inside, socket.create_connection(("127.0.0.1", self._target)) as outside, contextlib.suppress(OSError):
            ends = {inside: outside, outside: inside}
            while True:
                for ready in select.select(list(ends), [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    self.seen += data
                    ends[ready].sendall(data)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
        self._socket.close()


def test_the_wire_on_loopback_holds_no_text_no_tokens_no_seed_and_no_path(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    expected = simulate(pair.config)
    with vendor_running(pair.config, None) as (port, _):
        tap = Tap(port)
        _, accuracy, _ = sides.customer(pair.config, "customer", f"127.0.0.1:{tap.port}", None, True)
        tap.close()
    assert accuracy == expected.accuracy
    sent = pair.outbox.read(0)
    assert sent[-64:] in bytes(tap.seen), "the tap sees what is sent"
    holds_nothing_private(bytes(tap.seen), pair, tmp_path)


# ---- two processes


def recipe(folder: Path, made: Config) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(config_file.dump(made.to_dict()), encoding="utf-8")
    return path


class Side:
    """`sotto split ...` in a process of its own."""

    def __init__(self, folder: Path, name: str, *arguments: str):
        self.log = folder / f"{name}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from sotto.cli import main; main()", "split", *arguments],
                stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True,
            )  # fmt: skip

    def line(self, start: str, seconds: float = 120.0) -> str:
        """What follows these words in the output, once it is there."""
        until = time.monotonic() + seconds
        while True:
            for line in self.log.read_text().splitlines():
                if start in line:
                    return line.partition(start)[2].strip()
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)

    def stop(self, how: int) -> int:
        assert not psutil.Process(self.process.pid).children(), "it has no process beside it that could stay"
        self.process.send_signal(how)
        return self.process.wait(60)


class Two:
    """Starts both sides, and leaves none behind."""

    def __init__(self, folder: Path, path: Path):
        self.folder, self.path, self.sides = folder, path, list[Side]()
        signer = test_split_network.certificate(folder, "authority")
        for name in ("vendor", "customer"):
            test_split_network.certificate(folder, name, signer)

    def __enter__(self) -> Two:
        return self

    def __exit__(self, *details: object) -> None:
        for side in self.sides:
            side.process.kill()
            side.process.wait(20)

    def start(self, role: str, *arguments: str) -> Side:
        files = ["--certificate", f"{role}.pem", "--key", f"{role}.key", "--authority", "authority.pem"]
        side = Side(self.folder, f"{role}{len(self.sides)}", role, str(self.path), *files, *arguments)
        self.sides.append(side)
        return side

    def vendor(self, *arguments: str) -> tuple[Side, str, Path]:
        """(side, its port, its run folder)."""
        side = self.start("vendor", "--listen", "127.0.0.1:0", *arguments)
        port, _, run = side.line("listening on port ").partition("; run folder: ")
        return side, f"127.0.0.1:{port}", self.folder / run


@pytest.mark.slow
def test_two_processes_over_tls_of_which_each_is_killed_once(tmp_path: Path) -> None:
    """The customer is killed in its upload, and later the vendor; the end is that of the simulation."""
    made = test_split_run.config(tmp_path, {**SETTING, "chunk_examples": 1}, **SEEDED)
    expected = simulate(made)
    with Two(tmp_path, recipe(tmp_path, made)) as two:
        vendor, address, folder = two.vendor()
        inbox = folder / "private" / "inbox"
        first = two.start("customer", "--connect", address)
        run = tmp_path / first.line("run folder: ")

        def stored() -> dict[str, int]:
            return {each.name: each.stat().st_mtime_ns for each in inbox.glob("piece-*.bin")}

        flower_network.wait_for(lambda: len(stored()) >= 4, 120, "some pieces")
        first.stop(signal.SIGKILL)
        before = stored()
        sent = {each.name: each.read_bytes() for each in (run / "private" / "outbox").glob("piece-*.bin")}
        assert 4 <= len(before) < len(sent)
        second = two.start("customer", "--connect", address, "--resume", str(run))
        flower_network.wait_for(lambda: len(stored()) >= len(before) + 4, 120, "more pieces")
        vendor.stop(signal.SIGKILL)
        middle = stored()
        assert len(middle) < len(sent)
        assert second.process.wait(120) == 2
        assert "SOT829" in second.log.read_text()
        again, address, _ = two.vendor("--resume", str(folder))
        third = two.start("customer", "--connect", address, "--resume", str(run))
        assert float(third.line("accuracy ").split()[0]) == pytest.approx(expected.accuracy, abs=6e-5)
        assert third.process.wait(60) == 0
        assert again.stop(signal.SIGINT) == 0
        after = stored()
        assert after == {**after, **middle, **before}, "no piece came twice"
        assert {name: (inbox / name).read_bytes() for name in sent} == sent, "and none was drawn anew"

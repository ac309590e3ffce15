"""What passes between the sides: sizes, checksums, order, and everything that must be refused."""

from __future__ import annotations

import hashlib
import json
import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sotto.errors import SottoError
from sotto.split import wire
from sotto.split.cache import Inbox, Outbox, Representations
from sotto.split.wire import Agreement, Manifest, Piece

AGREED = Agreement("ab" * 32, 1, 6, "float16", 100, 3, "sent", 1, 8)
IDS = replace(AGREED, values="ids")
KEPT = replace(AGREED, labels="kept")


def piece(index: int = 0, agreed: Agreement = AGREED, examples: int = 4) -> Piece:
    generator = np.random.default_rng(index)
    lengths = generator.integers(1, 9, examples).astype(np.int32)
    labels = None if agreed.labels == "kept" else generator.integers(0, 3, examples).astype(np.int32)
    if agreed.values == "ids":
        return Piece(lengths, labels, generator.integers(0, 100, lengths.sum()).astype(np.int32))
    return Piece(lengths, labels, generator.normal(size=(int(lengths.sum()), 6)).astype(np.float16))


def fill(folder: Path, agreed: Agreement = AGREED, pieces: int = 3, make: Any = None) -> Outbox:
    return Outbox.fill(folder, agreed, {"data": "x"}, [4] * pieces, make or (lambda i: piece(i, agreed)))


def code(action: Any, *arguments: Any) -> str:
    with pytest.raises(SottoError) as caught:
        action(*arguments)
    return caught.value.code


def again(facts: wire.PieceFacts, data: bytes) -> wire.PieceFacts:
    """The same line of a manifest with the checksum of other bytes, so that the check behind it is reached."""

    return replace(facts, sha256=hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("agreed", [AGREED, IDS, KEPT])
def test_what_is_sent_arrives(tmp_path: Path, agreed: Agreement) -> None:
    outbox = fill(tmp_path / "out", agreed)
    inbox = Inbox.open(tmp_path / "in", outbox.manifest.to_json(), agreed)
    while not inbox.complete:
        inbox.accept(inbox.received, outbox.read(inbox.received))
    sent = inbox.open_all()
    assert len(sent) == outbox.manifest.examples == 12
    expected = [piece(i, agreed) for i in range(3)]
    assert sent.lengths_E.tolist() == [n for p in expected for n in p.lengths_E]
    if agreed.labels == "kept":
        assert sent.labels_E is None
    else:
        assert sent.labels_E is not None
        assert sent.labels_E.tolist() == np.concatenate([p.labels_E for p in expected]).tolist()  # type: ignore[arg-type]
    assert np.array_equal(
        np.concatenate([sent.rows(e) for e in range(12)]), np.concatenate([p.values for p in expected])
    )
    values, mask = sent.batch([11, 0, 5])
    for place, example in enumerate((11, 0, 5)):
        length = int(mask[place].sum())
        assert length == sent.lengths_E[example]
        assert np.array_equal(values[place, :length].numpy().astype(sent.rows(example).dtype), sent.rows(example))
        assert not values[place, length:].any()


def test_bytes_are_those_of_the_tensors_and_little_more() -> None:
    wide = replace(AGREED, width=384, max_rows=128)
    lengths = np.full(256, 20, dtype=np.int32)
    big = Piece(lengths, np.zeros(256, dtype=np.int32), np.zeros((5120, 384), dtype=np.float16))
    assert len(wire.encode(big)) == wide.piece_bytes(256, 5120) < 1.05 * big.values.nbytes


def test_files_are_private(tmp_path: Path) -> None:
    outbox = fill(tmp_path / "out")
    assert stat.S_IMODE(outbox.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(f.stat().st_mode) for f in outbox.folder.iterdir()} == {0o600}
    assert not list(outbox.folder.glob(".*"))


def test_noise_is_drawn_once_however_often_it_is_asked_for(tmp_path: Path) -> None:
    drawn: list[int] = []

    def make(index: int) -> Piece:
        drawn.append(index)
        return piece(index * 1000 + len(drawn))

    first = fill(tmp_path / "out", make=make)
    contents = [first.read(i) for i in range(3)]
    second = fill(tmp_path / "out", make=make)
    assert drawn == [0, 1, 2]
    assert [second.read(i) for i in range(3)] == contents


def test_a_crash_while_drawing_keeps_what_was_drawn(tmp_path: Path) -> None:
    def crash(index: int) -> Piece:
        if index == 2:
            raise KeyboardInterrupt
        return piece(index)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out", make=crash)
    kept = (tmp_path / "out" / "piece-000001.bin").read_bytes()
    made: list[int] = []
    outbox = fill(tmp_path / "out", make=lambda i: made.append(i) or piece(i + 50))
    assert made == [2]
    assert outbox.read(1) == kept


def test_another_release_needs_another_folder(tmp_path: Path) -> None:
    fill(tmp_path / "out")
    assert code(Outbox.fill, tmp_path / "out", AGREED, {"data": "y"}, [4] * 3, piece) == "SOT822"
    assert code(Outbox.fill, tmp_path / "out", IDS, {"data": "x"}, [4] * 3, piece) == "SOT822"


@pytest.mark.parametrize("name", ["piece-000001.bin", "manifest.json"])
def test_a_damaged_release_is_not_drawn_again(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert code(fill, tmp_path / "out") == "SOT823"
    path.unlink()
    if name.endswith("bin"):
        assert code(fill, tmp_path / "out") == "SOT823"


# ---- the vendor believes nothing


def test_an_upload_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    outbox = fill(tmp_path / "out")
    text = outbox.manifest.to_json()
    inbox = Inbox.open(tmp_path / "in", text, AGREED)
    inbox.accept(0, outbox.read(0))
    assert code(inbox.open_all) == "SOT824"
    later = Inbox.open(tmp_path / "in", text, AGREED)
    assert later.received == 1
    later.accept(1, outbox.read(1))
    # A torn file of a crash counts as not received.
    (tmp_path / "in" / "piece-000001.bin").write_bytes(b"torn")
    assert Inbox.open(tmp_path / "in", text, AGREED).received == 1


@pytest.mark.parametrize("index", [0, 2, 7, -1])
def test_replayed_and_reordered_pieces_are_refused(tmp_path: Path, index: int) -> None:
    outbox = fill(tmp_path / "out")
    inbox = Inbox.open(tmp_path / "in", outbox.manifest.to_json(), AGREED)
    inbox.accept(0, outbox.read(0))
    assert code(inbox.accept, index, outbox.read(max(0, min(index, 2)))) == "SOT821"
    assert code(inbox.accept, 1, outbox.read(0)) == "SOT821", "an old piece under a new number"
    assert inbox.received == 1
    inbox.accept(1, outbox.read(1))
    inbox.accept(2, outbox.read(2))
    assert code(inbox.accept, 3, outbox.read(2)) == "SOT821"


def test_a_second_customer_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    outbox = fill(tmp_path / "out")
    inbox = Inbox.open(tmp_path / "in", outbox.manifest.to_json(), AGREED)
    inbox.accept(0, outbox.read(0))
    other = fill(tmp_path / "other", make=lambda i: piece(i + 9))
    assert code(Inbox.open, tmp_path / "in", other.manifest.to_json(), AGREED) == "SOT820"
    assert Inbox.open(tmp_path / "in", outbox.manifest.to_json(), AGREED).received == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("bottom", "cd" * 32), ("classes", 4), ("width", 7), ("layer", 2), ("labels", "kept"), ("values", "ids"),
     ("max_rows", 9), ("vocabulary", 99), ("width", 6.0), ("width", True), ("classes", None), ("extra", 1)],
)  # fmt: skip
def test_a_manifest_that_was_not_agreed_on_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    values = json.loads(fill(tmp_path / "out").manifest.to_json())
    values["agreement"][name] = value
    assert code(Inbox.open, tmp_path / "in", json.dumps(values), AGREED) == "SOT820"
    assert not (tmp_path / "in").exists(), "nothing is stored for a stranger"


@pytest.mark.parametrize(
    "change",
    [{"examples": 0}, {"rows": 3}, {"rows": 33}, {"examples": 10**12, "rows": 10**12}, {"rows": "9"}, {"rows": True},
     {"sha256": "x" * 64}, {"sha256": "ab"}, {"rows": -1}, {"more": 1}, {"rows": 1.5}],
)  # fmt: skip
def test_a_piece_of_impossible_size_is_refused_before_anything_is_allocated(tmp_path: Path, change: dict) -> None:
    values = json.loads(fill(tmp_path / "out").manifest.to_json())
    values["pieces"][1] |= change
    assert code(Manifest.from_json, json.dumps(values), AGREED) == "SOT820"


def test_an_oversized_piece_is_refused() -> None:
    wide = replace(AGREED, width=100_000, max_rows=10_000)
    line = {"examples": 100, "rows": 1_000_000, "sha256": "ab" * 32}
    text = json.dumps({"version": 1, "agreement": wide.__dict__, "pieces": [line]})
    assert code(Manifest.from_json, text, wide) == "SOT820"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", "x" * 1000, "[" * 100_000, '{"version": 2}', '{"version":1,"agreement":[],"pieces":{}}'],
)
def test_what_is_no_manifest_is_refused(text: str) -> None:
    assert code(Manifest.from_json, text, AGREED) == "SOT820"


def spoilt(agreed: Agreement, **fields: Any) -> tuple[bytes, wire.PieceFacts]:
    original = piece(1, agreed)
    facts = wire.facts_of(original, wire.encode(original))
    data = wire.encode(replace(original, **{k: change(getattr(original, k)) for k, change in fields.items()}))
    return data, again(facts, data)


def put(value: float) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[-1] = value
        return array

    return change


@pytest.mark.parametrize(
    ("agreed", "fields"),
    [
        (AGREED, {"values": put(math.nan)}),
        (AGREED, {"values": put(math.inf)}),
        (AGREED, {"labels_E": put(3)}),
        (AGREED, {"labels_E": put(-1)}),
        (AGREED, {"lengths_E": put(0)}),
        (AGREED, {"lengths_E": put(9)}),
        (AGREED, {"lengths_E": put(-5)}),
        (IDS, {"values": put(100)}),
        (IDS, {"values": put(-1)}),
        (AGREED, {"values": lambda v: v[:-1]}),
        (AGREED, {"values": lambda v: np.concatenate([v, v])}),
        (AGREED, {"labels_E": lambda v: None}),
    ],
)
def test_broken_content_is_refused_even_with_a_fitting_checksum(agreed: Agreement, fields: dict) -> None:
    data, facts = spoilt(agreed, **fields)
    assert code(wire.decode, data, facts, agreed) == "SOT821"


def test_one_changed_bit_is_noticed() -> None:
    original = piece()
    data = wire.encode(original)
    facts = wire.facts_of(original, data)
    wire.decode(data, facts, AGREED)
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1
        assert code(wire.decode, bytes(changed), facts, AGREED) == "SOT821"


def test_refusals_hold_nothing_that_was_sent(tmp_path: Path) -> None:
    values = json.loads(fill(tmp_path / "out").manifest.to_json())
    values["agreement"]["bottom"] = "SECRET"
    with pytest.raises(SottoError) as caught:
        Manifest.from_json(json.dumps(values), AGREED)
    assert "SECRET" not in str(caught.value)
    for value in (None, 1, "x"):  # a name of the other side is repeated as little as a value of it
        values = json.loads(fill(tmp_path / "out").manifest.to_json())
        values["agreement"]["SECRET\n"] = value
        with pytest.raises(SottoError) as caught:
            Manifest.from_json(json.dumps(values), AGREED)
        assert caught.value.code == "SOT820"
        assert "SECRET" not in str(caught.value)
    del values["agreement"]["SECRET\n"], values["agreement"]["width"]
    assert code(Manifest.from_json, json.dumps(values), AGREED) == "SOT820"


def test_the_same_bytes_are_read_in_every_epoch(tmp_path: Path) -> None:
    outbox = fill(tmp_path / "out")
    sent = Representations.read(outbox.folder, outbox.manifest)
    first = [sent.batch([e])[0] for e in range(12)]
    for _ in range(3):
        assert all(torch.equal(sent.batch([e])[0], first[e]) for e in range(12))


@pytest.mark.parametrize("name", ["note", "about", "manifest"])
def test_a_stored_release_whose_notes_are_damaged_is_not_drawn_again(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "out")
    (note, *_), others = (
        sorted((tmp_path / "out").glob("*0.json")),
        {"about": "about.json", "manifest": "manifest.json"},
    )
    path = note if name == "note" else tmp_path / "out" / others[name]
    for content in (b"[" * 100_000, b"\xff", b"{}", b'{"examples": 1}'):
        path.write_bytes(content)
        assert code(fill, tmp_path / "out") in ("SOT822", "SOT823")

"""Bytes that somebody else wrote, wherever Sotto reads some: a result or a documented error, and bounded memory.

Each target starts from valid content that is edited at random, from text of the right alphabet, or from a corpus of
malicious files. `make fuzz` runs ten thousand examples of each.
"""

from __future__ import annotations

import io
import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_split_wire
import tiny_runs
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from test_fuzz import EDITS, Edits, edited, fuzz

import sotto
from sotto import checkpoint
from sotto.config import Config, DataSection
from sotto.data.records import read_table
from sotto.errors import SottoError
from sotto.models.config_json import read_config
from sotto.models.headers import read_header
from sotto.models.source import weight_files
from sotto.privacy.accounting import PoissonGaussian
from sotto.privacy.ledger import Ledger
from sotto.rundir import RunDir
from sotto.split import wire
from sotto.split.protocol import parse_query

CODES = set(re.findall(r"^\| (SOT\d{3}) \|", (Path(__file__).parent.parent / "docs/errors.md").read_text(), re.M))
MEMORY = 64 << 20
"""Bytes that a small file may make Sotto allocate."""
COLUMNS = ["text", "label", "who"]
SECTION = DataSection(train="x", text="text", label="label", labels=("a", "b"))

Reader = Callable[[Path, bytes], Any]


def outcome(action: Callable[[], Any]) -> str:
    """`read`, or the code of the documented error."""
    try:
        action()
    except SottoError as error:
        refused = error
    else:
        return "read"
    assert refused.code in CODES, refused
    assert refused.what
    return refused.code


# ---- what is read


def read_yaml(folder: Path, content: bytes) -> None:
    (folder / "x.yaml").write_bytes(content)
    Config.load(folder / "x.yaml")


def read_data(suffix: str) -> Reader:
    def read(folder: Path, content: bytes) -> None:
        (folder / f"x.{suffix}").write_bytes(content)
        table = read_table(SECTION, str(folder / f"x.{suffix}"), "train", COLUMNS)
        assert all(len(column) == len(table) for column in table.columns.values())
        assert all(isinstance(text, str) for column in table.columns.values() for text in column)

    return read


def read_ledger(folder: Path, content: bytes) -> None:
    for old in folder.glob("clinic.*"):
        old.unlink()
    (folder / "clinic.jsonl").write_bytes(content)
    (folder / "clinic.head").write_bytes((folder / "head").read_bytes())
    found = Ledger.open("clinic", folder)
    assert found.reserved("a") == 3, "what was charged is not forgotten"


def read_checkpoint(name: str) -> Reader:
    def read(folder: Path, content: bytes) -> None:
        path = folder / "checkpoints" / "step-00000002" / name
        kept = path.read_bytes()
        path.write_bytes(content)
        try:
            found, damaged = checkpoint.load_latest(folder / "checkpoints")
        finally:
            path.write_bytes(kept)
        assert found is not None
        assert found.step == (1 if damaged else 2)
        assert torch.equal(found.weights["w"], torch.full((4,), float(found.step)))

    return read


def read_run(name: str) -> Reader:
    def read(folder: Path, content: bytes) -> None:
        run = RunDir.open(folder / "runs" / "a")
        kept = (run.path / name).read_bytes()
        (run.path / name).write_bytes(content)
        try:
            assert sotto.ls(folder / "runs")[0]["epsilon"] in (4.0, None)
            assert outcome(lambda: sotto.show(run.path)) in ("read", "SOT516")
            assert run.read_json("privacy.json")["epsilon"] == 4.0
        finally:
            (run.path / name).write_bytes(kept)

    return read


def read_safetensors(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    read_header(folder / "model.safetensors")


def read_config_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    read_config(folder)


def read_weight_index(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_bytes(content)
    inside = folder.resolve()
    for file in weight_files(folder):
        assert file.resolve().is_relative_to(inside), "a file outside the model's folder"


def read_manifest(folder: Path, content: bytes) -> None:
    wire.Manifest.from_json(content.decode("utf-8", errors="replace"), test_split_wire.AGREED)


def read_query(folder: Path, content: bytes) -> None:
    parse_query(content, test_split_wire.AGREED)


def read_piece(folder: Path, content: bytes) -> None:
    piece = test_split_wire.piece()
    facts = test_split_wire.again(wire.facts_of(piece, b""), content)  # so that the checks behind the checksum run
    found = wire.decode(content, facts, test_split_wire.AGREED)
    assert np.isfinite(found.values).all()


# ---- valid content to start from


def valid_query() -> bytes:
    piece = test_split_wire.piece(agreed=test_split_wire.KEPT)
    data = wire.encode(piece)
    head = json.dumps(wire.facts_of(piece, data).__dict__).encode()
    return len(head).to_bytes(4, "little") + head + data


def valid_manifest() -> bytes:
    piece = test_split_wire.piece()
    facts = wire.facts_of(piece, wire.encode(piece))
    return wire.Manifest(test_split_wire.AGREED, (facts, facts)).to_json().encode()


def valid_parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({name: ["a", "b", None] for name in COLUMNS}), file)
    return file.getvalue()


CSV = b'text,label,who\n"a ""b"", c",a,1\nd,b,2\n'
ROW = json.dumps({"text": ["a", "b"], "label": "a", "who": 1.0}).encode()
TENSORS = save({"a": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)})
INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}).encode()
MODEL = json.dumps({"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32}).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnished(tmp_path_factory.mktemp("fuzz"))


def furnished(folder: Path) -> Path:
    """A folder with a ledger of three steps, two checkpoints and a finished run."""
    ledger, event = Ledger.open("clinic", folder), PoissonGaussian(1.0, 0.01)
    ledger.open_run("a", event, 9, delta=1e-5)
    for step in range(3):
        ledger.reserve("a", step, event)
    (folder / "clinic.jsonl").rename(folder / "ledger")
    (folder / "clinic.head").rename(folder / "head")
    (folder / "checkpoints").mkdir()
    for step in (1, 2):
        state = checkpoint.Checkpoint(step, {"w": torch.full((4,), float(step))}, {}, {"microbatch_size": 8})
        checkpoint.save(folder / "checkpoints", state)
    run = RunDir(folder / "runs" / "a")
    config = Config.from_dict(tiny_runs.classification(folder))
    run.create(config, {"steps": 3, "delta": 1e-5, "not_private": None}, {"secrets.json": "{}"})
    run.write_all({"statement.txt": "words", "privacy.json": json.dumps({"private": True, "epsilon": 4.0})})
    (folder / "yaml").write_text(yaml.safe_dump(tiny_runs.classification(folder)))
    return folder


TARGETS: dict[str, tuple[Reader, bytes | str]] = {
    "config": (read_yaml, "yaml"),
    "csv": (read_data("csv"), CSV),
    "tsv": (read_data("tsv"), CSV.replace(b",", b"\t")),
    "jsonl": (read_data("jsonl"), ROW + b"\n" + ROW + b"\n"),
    "json": (read_data("json"), b"[" + ROW + b",\n" + ROW + b"]"),
    "parquet": (read_data("parquet"), valid_parquet()),
    "ledger": (read_ledger, "ledger"),
    "manifest": (read_checkpoint("manifest.json"), "checkpoints/step-00000002/manifest.json"),
    "state": (read_checkpoint("state.json"), "checkpoints/step-00000002/state.json"),
    "weights": (read_checkpoint("weights.safetensors"), "checkpoints/step-00000002/weights.safetensors"),
    "plan": (read_run("plan.json"), "runs/a/plan.json"),
    "privacy": (read_run("privacy.json"), "runs/a/privacy.json"),
    "seal": (read_run("private/seal.json"), "runs/a/private/seal.json"),
    "safetensors": (read_safetensors, TENSORS),
    "model config": (read_config_json, MODEL),
    "weight index": (read_weight_index, INDEX),
    "split manifest": (read_manifest, valid_manifest()),
    "split query": (read_query, valid_query()),
    "split piece": (read_piece, wire.encode(test_split_wire.piece())),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_valid_content_is_read(target: str, folder: Path) -> None:
    """Or the tests below would only ever see refusals."""
    read, content = TARGETS[target]
    whole = (folder / content).read_bytes() if isinstance(content, str) else content
    if target == "weight index":
        (folder / "model-1.safetensors").write_bytes(TENSORS)
    assert outcome(lambda: read(folder, whole)) == "read"


@pytest.mark.parametrize("target", TARGETS)
def test_edited_content(target: str, folder: Path) -> None:
    read, content = TARGETS[target]
    whole = (folder / content).read_bytes() if isinstance(content, str) else content

    @fuzz
    @given(EDITS)
    def check(edits: Edits) -> None:
        outcome(lambda: read(folder, edited(whole, edits)))

    check()


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes(target: str, folder: Path) -> None:
    read, _ = TARGETS[target]

    @fuzz
    @given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
    def check(content: bytes) -> None:
        outcome(lambda: read(folder, content))

    check()


# ---- a corpus of malicious files

DEEP = 100_000
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def parquet(find: bytes, put: bytes) -> bytes:
    """A good file in which some bytes are others."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"odd_name": ["a"], "text": ["odd value"]}), sink, compression="none")
    content = sink.getvalue().to_pybytes()
    assert find in content
    return content.replace(find, put)


CORPUS: dict[str, tuple[Reader, bytes]] = {
    "billion laughs": (read_yaml, LAUGHS.encode()),
    "billion laughs in a section": (read_yaml, ("model:\n" + re.sub("(?m)^", "  ", LAUGHS)).encode()),
    "an object": (read_yaml, b"model: !!python/object/apply:os.system ['true']\n"),
    "a name": (read_yaml, b"model: !!python/name:os.system\n"),
    "deep YAML": (read_yaml, b"model: " + b"[" * (DEEP // 100)),  # slow while memory is traced
    "deep YAML mappings": (read_yaml, b"{a: " * DEEP),
    "an endless alias": (read_yaml, b"model: &a\n  name: *a\n"),
    "a key that is a list": (read_yaml, b"? [a, b]\n: c\n"),
    "a long number": (read_yaml, b"run: {steps: " + b"9" * 100_000 + b"}\n"),
    "a number in base sixty": (read_yaml, b"run: {steps: " + b"1:" * 20_000 + b"1}\n"),
    "a date that is none": (read_yaml, b"run: {steps: 2001-99-99}\n"),
    "binary that is none": (read_yaml, b"run: {steps: !!binary '====='}\n"),
    "a truth that is none": (read_yaml, b"run: !!bool x\n"),
    "an empty number": (read_yaml, b"run: !!int ''\n"),
    "a date that is a word": (read_yaml, b"run: !!timestamp x\n"),
    "a set": (read_yaml, b"model: !!set {a, b}\n"),
    "deep JSON": (read_data("jsonl"), b'{"text": ' + b"[" * DEEP + b"]" * DEEP + b"}\n"),
    "a deep array": (read_data("json"), b"[" * DEEP),
    "a JSON number of a megabyte": (read_data("jsonl"), b'{"text": ' + b"9" * (1 << 20) + b"}\n"),
    "NaN": (read_data("jsonl"), b'{"text": NaN, "label": Infinity, "who": -Infinity}\n'),
    "half a character": (read_data("jsonl"), b'{"text": "\\ud800", "label": "a", "who": "1"}\n'),
    "NUL in a table": (read_data("csv"), b"text,label,who\n\x00,\x00,\x00\n"),
    "many open quotes": (read_data("csv"), b"text,label,who\n" + b'"a\n' * 5001),
    "many columns": (read_data("csv"), b"," * 200_000 + b"\n"),
    "no Parquet": (read_data("parquet"), b"PAR1" + b"\xff" * 100 + b"\xff\xff\xff\x7f" + b"PAR1"),
    "a column whose name is no text": (read_data("parquet"), parquet(b"odd_name", b"odd\xed\x41ame")),
    "a value that is no text": (read_data("parquet"), parquet(b"odd value", b"odd\xed\x41alue")),
    "a huge header": (read_safetensors, tensors(b"{}", length=2**63)),
    "a header of 9 MiB": (read_safetensors, tensors(b"{" + b" " * (9 << 20) + b"}")),
    "a deep header": (read_safetensors, tensors(b'{"a":' * DEEP)),
    "overlapping offsets": (read_safetensors, tensors({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12))),
    "offsets beyond the end": (read_safetensors, tensors({"a": tensor(0, 2**40, [2**38])}, bytes(8))),
    "negative offsets": (read_safetensors, tensors({"a": tensor(-8, 0, [2])}, bytes(8))),
    "a shape that overflows": (read_safetensors, tensors({"a": tensor(0, 0, [2**62, 2**62, 0])})),
    "NaN in a header": (read_safetensors, tensors(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}')),
    "a name twice": (read_safetensors, tensors(b'{"__metadata__": {}, "__metadata__": {}}')),
    "sixty thousand tensors": (read_safetensors, tensors({str(i): tensor(0, 0, [0]) for i in range(60_000)})),
    "weights elsewhere": (read_weight_index, json.dumps({"weight_map": {"a": "../../etc/passwd"}}).encode()),
    "weights at the root": (read_weight_index, json.dumps({"weight_map": {"a": "/etc/passwd"}}).encode()),
    "weights in a pickle": (read_weight_index, json.dumps({"weight_map": {"a": "model.bin"}}).encode()),
    "remote code": (read_config_json, json.dumps({"model_type": "bert", "auto_map": {"AutoModel": "x.Y"}}).encode()),
    "a deep model": (read_config_json, b'{"a":' * DEEP),
    "a deep split manifest": (read_manifest, b'{"a":' * DEEP),
    "a split manifest of NaN": (read_manifest, valid_manifest().replace(b'"examples": 4', b'"examples": NaN')),
    "a split manifest of huge pieces": (read_manifest, valid_manifest().replace(b'"rows": ', b'"rows": 9999999')),
    "a split query of huge length": (read_query, b"\xff" * 4 + valid_query()[4:]),
    "a split query of nothing": (read_query, b""),
    "a split piece of NaN": (read_piece, wire.encode(test_split_wire.piece())[:-2] + b"\xff\xff"),
}


@pytest.mark.parametrize("name", CORPUS)
def test_malicious_files(name: str, folder: Path) -> None:
    read, content = CORPUS[name]
    tracemalloc.start()
    try:
        result = outcome(lambda: read(folder, content))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY + 8 * len(content), f"{peak >> 20} MiB"
    harmless = ("a JSON number of a megabyte", "NaN", "half a character", "deep JSON", "NUL in a table", "remote code",
                "many open quotes")  # fmt: skip
    assert (result != "read") or name in harmless, "bad rows cost themselves, and code is dropped"


def test_a_path_that_leads_out(folder: Path, tmp_path: Path) -> None:
    """A model folder whose weights are a link to a file elsewhere, which the Hub's cache has as well, stays a model."""
    (tmp_path / "secret").write_text("a secret that is no model")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "secret")
    assert outcome(lambda: read_header(tmp_path / "model.safetensors")) == "SOT304"
    for name in ("../x", "a/b", "..", "", "a\x00b", "x" * 300):
        assert outcome(lambda name=name: Ledger.open(name, tmp_path)) == "SOT401"
    config = Config.from_dict(tiny_runs.classification(folder, output={"name": "../../x/\x00y"}))
    assert RunDir.planned(config, "s").path.parent == Path(config.output.dir)


@pytest.mark.parametrize("kind", ["directory", "endless"])
def test_a_file_that_is_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert outcome(lambda: Config.load(path)) in ("SOT100", "SOT101")


def test_an_agreement_is_compared_before_anything_is_allocated() -> None:
    """A manifest may announce a hundred million examples; nothing of that size exists before the piece has come."""
    agreed = replace(test_split_wire.AGREED, width=1)
    facts = {"examples": 90_000_000, "rows": 90_000_000, "sha256": "ab" * 32}
    tracemalloc.start()
    try:
        checked = wire.check_piece(facts, agreed)
        assert outcome(lambda: wire.decode(b"short", checked, agreed)) == "SOT821"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()

"""Hostile input: whatever is read either is what it should be, or is refused with an error that Sotto documents.

`make fuzz` runs the same tests with ten thousand examples each.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import sotto
from sotto import checkpoint
from sotto.data.records import read_table
from sotto.errors import SottoError
from sotto.federated import messages
from sotto.privacy.ledger import Ledger
from sotto.split import wire

EXAMPLES = int(os.environ.get("SOTTO_FUZZ_EXAMPLES", "40"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize="SOTTO_FUZZ_EXAMPLES"
    not in os.environ,  # what `make fuzz` finds becomes an example; CI finds nothing new
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
Edits = list[tuple[int, int, bytes]]
EDITS: st.SearchStrategy[Edits] = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.binary(max_size=12)), min_size=1, max_size=4
)
"""Places, how much is taken out there, and what is put in instead."""


def edited(content: bytes, edits: Edits) -> bytes:
    for at, removed, added in edits:
        at %= len(content) + 1
        content = content[:at] + added + content[at + removed :]
    return content


def only_documented(action: Callable[[], Any]) -> Any:
    """What an action returns, or None where it is refused."""
    refused: SottoError | None = None
    try:
        return action()
    except SottoError as error:
        refused = error
    assert refused.code.startswith("SOT")
    assert all(part.strip() for part in (refused.what, refused.why, refused.fix))
    return None


# ---- configurations

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.just("${HOME}")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)),
    max_leaves=8,
)
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)


@fuzz
@given(EDITS)
def test_an_edited_configuration_is_read_or_refused(tmp_path: Path, edits: Edits):
    path = tiny_runs.write_yaml(tmp_path)
    path.write_bytes(edited(path.read_bytes(), edits))
    found = only_documented(lambda: sotto.Config.load(path))
    assert found is None or isinstance(found, sotto.Config)


@fuzz
@given(st.sampled_from(["model", "data", "privacy", "method", "run", "output", "setting"]), st.text(max_size=9), VALUES)
@example("privacy", "epsilon", float("nan"))
@example("run", "steps", 10**400)
@example("setting", "kind", ["federated"])
def test_a_value_of_any_kind_in_any_section_is_read_or_refused(tmp_path: Path, section: str, key: str, value: Any):
    values = tiny_runs.classification(tmp_path)
    names = sorted(values.get(section, {})) or ["kind"]
    values.setdefault(section, {})[names[len(key) % len(names)]] = value
    only_documented(lambda: sotto.Config.from_dict(values))


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['true']", "a: !!python/name:os.system", BOMB, "[" * 3000, "{a: " * 900, "\x00",
     "- 1", "&a [*a]", "a: 1\na: 2", "\ufeff", "model: {name: ${NOT_SET_ANYWHERE}}"],
)  # fmt: skip
def test_yaml_that_is_an_attack_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SottoError):
        sotto.Config.load(path)


# ---- data


@fuzz
@given(st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet", ".json"]), st.binary(max_size=300))
def test_any_bytes_are_a_table_or_refused(tmp_path: Path, suffix: str, content: bytes):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    section = tiny_runs.config(tmp_path).data
    only_documented(lambda: read_table(section, str(path), "train", ["text", "label"]))


@fuzz
@given(EDITS)
def test_an_edited_table_is_read_or_refused(tmp_path: Path, edits: Edits):
    path = tiny_runs.write_jsonl(tmp_path / "data.jsonl", tiny_runs.rows(4))
    path.write_bytes(edited(path.read_bytes(), edits))
    section = tiny_runs.config(tmp_path).data
    only_documented(lambda: read_table(section, str(path), "train", ["text", "label", "who"]))


# ---- files of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "ledger").mkdir()
    before = os.environ.get("SOTTO_LEDGER_DIR")
    os.environ["SOTTO_LEDGER_DIR"] = str(folder / "ledger")
    try:
        sotto.train(tiny_runs.config(folder, run={"steps": 3}))
    finally:
        if before is not None:
            os.environ["SOTTO_LEDGER_DIR"] = before
    return folder


@fuzz
@given(EDITS)
def test_an_edited_ledger_never_shows_less_but_for_its_torn_end(finished: Path, tmp_path: Path, edits: Edits):
    (original,) = (finished / "ledger").glob("*.jsonl")
    whole = Ledger.open(original.stem, original.parent)
    copy = tmp_path / original.name
    copy.write_bytes(edited(original.read_bytes(), edits))
    found = only_documented(lambda: Ledger.open(copy.stem, tmp_path))
    if found is not None:
        kept = copy.read_bytes()
        lines = original.read_bytes().splitlines()
        assert kept.splitlines() == lines[: len(kept.splitlines())]  # nothing but a beginning of it is believed
        assert all(found.reserved(run) <= whole.reserved(run) for run in whole.runs)


@fuzz
@given(st.sampled_from(["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]), EDITS)
def test_an_edited_checkpoint_is_passed_over(finished: Path, tmp_path: Path, name: str, edits: Edits):
    run = tiny_runs.only_run(finished)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run / "checkpoints", folder)
    newest = sorted(folder.glob("step-*"))[-1]
    before = (newest / name).read_bytes()
    (newest / name).write_bytes(edited(before, edits))
    latest, damaged = checkpoint.load_latest(folder)
    if (newest / name).read_bytes() != before and name != "manifest.json":
        assert damaged == [newest.name]
        assert latest is None or latest.step < 3


@fuzz
@given(st.sampled_from(["config.yaml", "plan.json", "privacy.json", "private/secrets.json"]), EDITS)
def test_an_edited_run_is_shown_and_resumed_or_refused(finished: Path, tmp_path: Path, name: str, edits: Edits):
    run = tmp_path / "runs" / "copy"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(tiny_runs.only_run(finished), run)
    (run / name).write_bytes(edited((run / name).read_bytes(), edits))
    only_documented(lambda: sotto.ls(run.parent))
    only_documented(lambda: sotto.show(run))


def test_a_damaged_last_checkpoint_is_not_replaced_by_an_older_one(finished: Path, tmp_path: Path):
    """The older one is whole, and another model than the one that the statement is about."""
    run = tmp_path / "run"
    shutil.copytree(tiny_runs.only_run(finished), run)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert len(list((run / "checkpoints").glob("step-*"))) == 2
    (newest / "weights.safetensors").write_bytes((newest / "weights.safetensors").read_bytes()[:-1] + b"!")
    with pytest.raises(SottoError, match="SOT512"):
        sotto.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- messages

SHAPES = {"w": (3, 2), "b": (4,)}


@pytest.fixture(autouse=True)
def in_an_app(monkeypatch: pytest.MonkeyPatch):
    for name in ("_run_id", "_node_id", "_task_id"):  # which Flower sets in the process of an app
        monkeypatch.setattr(TaskIdentity, name, 1)


SCALARS = st.one_of(
    st.integers(-(2**62), 2**62), st.floats(), st.text(max_size=8), st.booleans(), st.binary(max_size=8)
)
FIELDS = st.sampled_from(["run", "step", "clip_norm", "agreement", "users"])


@fuzz
@given(st.dictionaries(FIELDS, st.one_of(SCALARS, st.lists(st.integers(-9, 9), max_size=3))), st.binary(max_size=200))
def test_an_order_of_any_kind_is_refused(facts: dict[str, Any], data: bytes):
    weights = ArrayRecord({"w": Array("float32", (3, 2), "numpy.ndarray", data)})
    content = RecordDict({"order": ConfigRecord(facts), "weights": weights})
    assert only_documented(lambda: messages.read_order(Message(content, 1, messages.TRAIN), SHAPES)) is None


@fuzz
@given(EDITS, st.sampled_from(["float32", "int32", "float64", "object"]))
def test_an_edited_answer_is_a_vector_or_nothing(edits: Edits, kind: str):
    honest = Array(np.arange(20, dtype=np.float32))
    sent = Array(kind, (20,), "numpy.ndarray", edited(honest.data, edits))
    order = Message(RecordDict({}), 1, messages.TRAIN)
    reply = Message(RecordDict({"update": ArrayRecord({"0": sent})}), reply_to=order)
    ((_, found),) = messages.vectors_of(reply, [0], 20, "float32")
    assert found is None or (found.dtype == np.float32 and found.shape == (20,))


@fuzz
@given(st.dictionaries(st.sampled_from(["first", "every", "count", "model"]), SCALARS))
def test_a_hello_of_any_kind_is_users_of_the_register_or_nothing(facts: dict[str, Any]):
    content = RecordDict({"node": ConfigRecord(facts)})
    users = messages.users_of(Message(content, 1, messages.HELLO), "m", 50)
    assert isinstance(users, str) or (len(users) <= 50 and all(0 <= user < 50 for user in users))


@fuzz
@given(st.binary(max_size=600))
def test_any_bytes_are_no_piece_of_a_split_upload(data: bytes):
    agreed = _split_agreement()
    facts = only_documented(lambda: wire.check_piece({"number": 0, "examples": 2, "rows": 4, "sha256": "0"}, agreed))
    if facts is not None:
        only_documented(lambda: wire.decode(data, facts, agreed))


@fuzz
@given(VALUES)
def test_any_facts_about_a_piece_are_refused(value: Any):
    only_documented(lambda: wire.check_piece(value, _split_agreement()))


@fuzz
@given(st.one_of(st.text(max_size=80), VALUES.map(lambda v: json.dumps(v, default=str))))
def test_any_text_is_no_manifest(text: str):
    only_documented(lambda: wire.Manifest.from_json(text, _split_agreement()))


def _split_agreement() -> Any:
    import dataclasses

    kinds = {"int": 4, "str": "x", "bool": True, "float": 1.0}
    values = {f.name: kinds.get(str(f.type), 4) for f in dataclasses.fields(wire.Agreement)}
    return wire.Agreement(**values)

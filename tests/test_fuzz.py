"""Hostile input: whatever is read either is what it should be, or is refused with an error that Sotto documents.

`make fuzz` runs the same tests with ten thousand examples each. Files are in test_fuzz_files.py; here are values and
messages.
"""

from __future__ import annotations

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
from sotto.errors import SottoError
from sotto.federated import messages

EXAMPLES = int(os.environ.get("SOTTO_FUZZ_EXAMPLES", "40"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize="SOTTO_FUZZ_EXAMPLES"
    not in os.environ,  # what `make fuzz` finds becomes an example; CI finds nothing new
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
PIECES = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b"\x00", b"\xff" * 8, b"{", b"[", b'"', b",", b"-1", b"1e999", b"NaN", b"null", b"9" * 30, b"\n",
                     b"&a ", b"*a", b"!!python/name:os.system ", b"../", b"\xed\xa0\x80", b"[" * 3000, b'{"":' * 3000]),
)  # fmt: skip
Edits = list[tuple[int, int, bytes]]
EDITS: st.SearchStrategy[Edits] = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 40), PIECES), min_size=1, max_size=4
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

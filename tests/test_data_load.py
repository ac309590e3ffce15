import csv
import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from sotto.config import Config
from sotto.data import has_eval, ledger_id, load_dataset_for
from sotto.errors import SottoError

SHARED = Path(os.environ.get("SOTTO_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {name: i for i, name in enumerate(["<pad>", "<unk>", "</s>", *(f"w{i}" for i in range(50))])}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def config(path: Path | str, *, data: dict[str, Any] | None = None, **privacy: Any) -> Config:
    columns = {"text": "text", "label": "label", "labels": ["0", "1"], "max_length": 8} if data is None else data
    return Config.from_dict(
        {
            "model": {"name": "m"},
            "data": {"train": str(path), **columns},
            "privacy": {"unit": "record", "num_units": 4, "epsilon": 3.0, **privacy},
            "run": {"expected_batch_size": 2, "steps": 3},
        }
    )


def rows_file(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label", "who")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


ROWS = [("w1 w2", "0", "ann"), ("w3", "1", "bob"), ("w4 w5", "1", "ann"), ("w6", "0", "cy")]


def failure(cfg: Config, tokenizer: PreTrainedTokenizerFast, which: Any = "train") -> SottoError:
    with pytest.raises(SottoError) as caught:
        load_dataset_for(cfg, tokenizer, which)
    error = caught.value
    assert all((error.what, error.where, error.why, error.fix))
    return error


def test_records(tmp_path, tokenizer):
    data = load_dataset_for(config(rows_file(tmp_path / "a.csv", ROWS)), tokenizer, "train")
    assert len(data.examples) == len(data.units) == 4
    assert data.report.class_counts == {"0": 2, "1": 2}
    assert data.report.warnings == []
    assert data.report.rows == data.report.rows_used == 4
    assert re.fullmatch("[0-9a-f]{64}", data.fingerprint)


def test_units_and_the_contribution_bound(tmp_path, tokenizer):
    path = rows_file(tmp_path / "a.csv", [*ROWS, ("w7", "1", " ann "), ("w8", "1", "")])
    data = load_dataset_for(config(path, unit="who", num_units=3, max_examples_per_unit=2), tokenizer, "train")
    assert len(data.units) == 3
    assert data.report.dropped_examples == 1
    assert data.report.unit_examples == (1, 1.0, 2)
    assert data.report.to_dict()["bad_rows"] == {"missing unit": {"count": 1, "lines": [7]}}
    assert data.report.rows == 6
    assert data.report.rows_used == 5


def test_a_row_that_is_left_out_moves_nobody_to_another_unit(tmp_path, tokenizer):
    left_out = {1: ("w2", "9", "bob"), 4: ("", "1", "bob")}
    rows = [("w1", "0", "ann"), left_out[1], ("w3", "1", "cy"), ("w4 w5", "0", "ann"), left_out[4], ("w6", "1", "bob")]
    path = rows_file(tmp_path / "a.csv", rows)
    data = load_dataset_for(config(path, unit="who", num_units=3, max_examples_per_unit=2), tokenizer, "train")
    assert data.report.rows_used == 4
    examples, found = data.examples, []
    for unit in range(len(data.units)):
        members, _ = data.units.members_of(np.array([unit]))
        ids = [examples.input_ids[examples.offsets[m] : examples.offsets[m + 1]] for m in members]
        found.append({tokenizer.decode(some, skip_special_tokens=True) for some in ids})
    assert sorted(found, key=min) == [{"w1", "w4 w5"}, {"w3"}, {"w6"}]


def test_the_fingerprint_is_of_the_text(tmp_path, tokenizer):
    def of(path: Path, **options: Any) -> str:
        return load_dataset_for(config(path, **options), tokenizer, "train").fingerprint

    first = of(rows_file(tmp_path / "a.csv", ROWS))
    shuffled = random.Random(0).sample(ROWS, 4)
    (tmp_path / "sub").mkdir()
    assert of(rows_file(tmp_path / "sub" / "b.csv", shuffled)) == first
    lines = [json.dumps({"text": t, "label": int(label)}) for t, label, _ in ROWS]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    assert of(tmp_path / "c.jsonl") == first
    assert of(rows_file(tmp_path / "d.csv", [("w1 w2 w2", "0", "ann"), *ROWS[1:]])) != first
    assert of(rows_file(tmp_path / "e.csv", [*ROWS, ROWS[0]])) != first
    # Another unit or other labels on the same words meet in one fingerprint; the unit is part of the ledger's name.
    assert of(tmp_path / "a.csv", unit="who", num_units=3, max_examples_per_unit=2) == first
    relabelled = [(text, "1", who) for text, _, who in ROWS[:1]] + ROWS[1:]
    assert of(rows_file(tmp_path / "f.csv", relabelled)) == first


def test_a_ledger_belongs_to_a_dataset_and_a_unit(tmp_path):
    path = rows_file(tmp_path / "a.csv", ROWS)
    by_record, by_person = config(path), config(path, unit="who", num_units=3, max_examples_per_unit=2)
    assert ledger_id(by_record, "f" * 64) == "f" * 32 + ".record"
    assert ledger_id(by_person, "f" * 64) == "f" * 32 + ".who"
    named = config(path, unit="who", num_units=3, max_examples_per_unit=2, dataset="clinic")
    assert ledger_id(named, "f" * 64) == ledger_id(named, "e" * 64) == "clinic.who"


def test_evaluation_has_no_units_no_bound_and_no_budget(tmp_path, tokenizer):
    train = rows_file(tmp_path / "a.csv", ROWS)
    held_out = rows_file(tmp_path / "b.csv", [("w1", "0")] * 3, header=("text", "label"))
    columns = {"text": "text", "label": "label", "labels": ["0", "1"], "eval": str(held_out)}
    cfg = config(train, data=columns, unit="who", num_units=300)
    data = load_dataset_for(cfg, tokenizer, "eval")
    assert len(data.units) == 3
    assert data.report.dropped_examples == 0
    assert data.report.warnings == ["no example of the class '1'"]
    assert has_eval(cfg.data)
    assert not has_eval(config(train).data)
    assert failure(config(train), tokenizer, "eval").code == "SOT214"


def test_a_long_document_is_one_record_in_training(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    texts = ["w1 " * 20, "w2", "w3 w4", "w5 " * 9]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    cfg = config(path, data={"text": "text", "max_length": 8, "eval": str(path)})
    data = load_dataset_for(cfg, tokenizer, "train")
    assert len(data.units) == 4
    assert len(data.units.members) == 4
    assert data.report.dropped_examples == len(data.examples) - 4 > 0
    assert any("one piece" in warning for warning in data.report.warnings)
    assert len(load_dataset_for(cfg, tokenizer, "eval").units) == len(data.examples)


def test_bad_rows_stop_or_skip(tmp_path, tokenizer):
    path = rows_file(tmp_path / "a.csv", [*ROWS, ("", "0", "x"), ("w1", "7", "x"), ("w9 " * 20, "0", "x")])
    columns = {"text": "text", "label": "label", "labels": ["0", "1"], "max_length": 8}
    data = load_dataset_for(config(path, data=columns), tokenizer, "train")
    assert {reason: group.lines for reason, group in data.report.bad_rows.items()} == {
        "empty text": [6],
        "label not in data.labels": [7],
        "longer than max_length: cut": [8],
    }
    assert data.report.rows_used == 5
    error = failure(config(path, data={**columns, "bad_rows": "stop"}), tokenizer)
    assert error.code == "SOT210"
    assert "line 6 (empty text), line 7 (label not in data.labels)" in error.what
    assert "line 8" not in error.what
    whole = rows_file(tmp_path / "b.csv", [*ROWS, ("w9 " * 20, "0", "x")])
    assert len(load_dataset_for(config(whole, data={**columns, "bad_rows": "stop"}), tokenizer, "train").examples) == 5


def test_what_makes_training_senseless(tmp_path, tokenizer):
    one_class = rows_file(tmp_path / "a.csv", [(t, "0", u) for t, _, u in ROWS])
    assert failure(config(one_class), tokenizer).code == "SOT212"
    unusable = rows_file(tmp_path / "b.csv", [(t, "maybe", u) for t, _, u in ROWS])
    error = failure(config(unusable), tokenizer)
    assert error.code == "SOT211"
    assert "4 x label not in data.labels" in error.why
    same = rows_file(tmp_path / "c.csv", [(t, label, "ann") for t, label, _ in ROWS])
    assert failure(config(same, unit="who", max_examples_per_unit=9), tokenizer).code == "SOT213"


def test_warnings(tmp_path, tokenizer):
    rows = [*ROWS, (" W1  w2", "0", "Ann"), ("w1 w2", "0", "ann")]
    path = rows_file(tmp_path / "a.csv", rows)
    cfg = config(path, unit="who", num_units=10, max_examples_per_unit=2, delta=0.2)
    report = load_dataset_for(cfg, tokenizer, "train").report
    assert report.shared_texts == 1
    wanted = ["max_examples_per_unit", "num_units says 10, the data has 4", "not below 1/num_units"]
    wanted += ["1 texts stand under more than one unit", "2 units differ from another in upper and lower case"]
    assert len(report.warnings) == len(wanted)
    assert all(part in warning for part, warning in zip(wanted, report.warnings, strict=True))


def test_neither_report_nor_error_holds_text_of_a_row(tmp_path, tokenizer):
    secret = "Sq7secret"
    rows = [*ROWS, (secret, "0", secret), (secret, secret, secret), (secret + " w" * 30, "1", "dan"), ("", "0", secret)]
    path = rows_file(tmp_path / "a.csv", rows)
    path.write_bytes(path.read_bytes() + f"{secret},{secret}\n{secret}".encode() + b"\xff,0,x\n")
    cfg = config(path, unit="who", num_units=5, max_examples_per_unit=2)
    report = load_dataset_for(cfg, tokenizer, "train").report
    stops = cfg.model_copy(update={"data": cfg.data.model_copy(update={"bad_rows": "stop"})})
    for shown in (report.render(), repr(report), json.dumps(report.to_dict()), str(failure(stops, tokenizer))):
        without_path = shown.replace(str(tmp_path), "")  # the folder's own name may hold a word of the data
        assert secret not in shown
        assert "w1" not in without_path


def test_render_is_short_plain_text(tmp_path, tokenizer):
    path = rows_file(tmp_path / "a.csv", [*ROWS, *[("", "0", "x")] * 30])
    text = load_dataset_for(config(path), tokenizer, "train").report.render()
    assert "rows       34 found, 4 usable" in text
    assert "classes    0: 2, 1: 2" in text
    assert re.search(r"bad rows   30 x empty text: lines 6, 7, .*, 25, \.\.\.", text)


def test_sst2_end_to_end(tokenizer):
    file = SHARED / "data" / "sst2" / "train.tsv"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    columns = {"text": "sentence", "label": "label", "labels": ["0", "1"], "max_length": 32}
    start = time.perf_counter()
    data = load_dataset_for(config(file, data=columns, num_units=67_349), tokenizer, "train")
    assert time.perf_counter() - start < 30
    assert data.report.class_counts == {"0": 29_780, "1": 37_569}
    assert data.report.rows_used == 67_349


def test_shakespeare_by_speaker_end_to_end(tokenizer):
    file = SHARED / "data" / "shakespeare" / "by_speaker.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    cfg = config(
        file, data={"text": "speeches", "max_length": 64}, unit="speaker", num_units=299, max_examples_per_unit=4
    )
    data = load_dataset_for(cfg, tokenizer, "train")
    assert len(data.units) == 299
    assert data.report.unit_examples[2] == 4
    assert data.report.rows == 7_095

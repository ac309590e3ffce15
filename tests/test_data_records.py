import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sotto.config import DataSection
from sotto.data import formats
from sotto.data.records import BadRow, Table, read_table
from sotto.errors import SottoError

SHARED = Path(os.environ.get("SOTTO_SHARED", Path(__file__).parents[2] / "shared"))
SECTION = DataSection(train="x", text="text", label="label", labels=("0", "1"))


def read(path: Path | str, *columns: str) -> Table:
    return read_table(SECTION, str(path), "train", list(columns or ("text", "label")))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def failure(path: Path | str, *columns: str) -> SottoError:
    with pytest.raises(SottoError) as caught:
        read(path, *columns)
    error = caught.value
    assert all((error.what, error.where, error.why, error.fix))
    return error


def test_csv_quoted_newlines_are_one_row_and_lines_are_those_of_the_file(tmp_path):
    file = write(tmp_path / "a.csv", 'text,label\n"one\ntwo, ""three""",1\n\nfour,0\n')
    table = read(file)
    assert table.columns == {"text": ['one\ntwo, "three"', "four"], "label": ["1", "0"]}
    assert table.lines == [2, 5]
    assert table.bad == []


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_csv_with_any_line_end_with_or_without_a_bom_and_final_newline(tmp_path, bom, end):
    for last in (end, b""):
        file = write(tmp_path / "a.csv", bom + b"text,label" + end + "größe,1".encode() + end + b"b,0" + last)
        table = read(file)
        assert table.columns == {"text": ["größe", "b"], "label": ["1", "0"]}
        assert table.lines == [2, 3]


def test_a_latin1_line_costs_only_itself(tmp_path):
    file = write(tmp_path / "a.csv", b"text,label\ngood,1\ncaf\xe9,1\nfine,0\n")
    table = read(file)
    assert table.columns["text"] == ["good", "fine"]
    assert table.bad == [BadRow(3, "not UTF-8")]
    lines = write(
        tmp_path / "a.jsonl", b'{"text":"good","label":1}\n{"text":"caf\xe9","label":1}\n{"text":"fine","label":0}'
    )
    table = read(lines)
    assert table.columns == {"text": ["good", "fine"], "label": ["1", "0"]}
    assert table.bad == [BadRow(2, "not UTF-8")]
    assert table.lines == [1, 3]


def test_ragged_csv(tmp_path):
    table = read(write(tmp_path / "a.csv", "text,label\na\nb,1\nc,0,extra\nd,0\n"))
    assert table.columns["text"] == ["b", "d"]
    assert table.bad == [BadRow(2, "wrong number of columns"), BadRow(4, "wrong number of columns")]
    assert len(table) == 2


def test_an_open_quote_does_not_swallow_the_rest_of_the_file(tmp_path):
    table = read(write(tmp_path / "a.csv", 'text,label\na,1\n"b,0\nc,1\n"d\ne",0\nf,1'))
    # The stray quote of line 3 is closed by the one of line 5: those rows are one broken record.
    assert "f" in table.columns["text"]
    table = read(write(tmp_path / "b.csv", 'text,label\na,1\n"b,0\nc,1\nd,0\n'))
    assert table.columns["text"] == ["a", "c", "d"]
    assert table.lines == [2, 4, 5]
    assert table.bad == [BadRow(3, "a quote that is never closed")]


def test_too_many_open_quotes_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_OPEN_QUOTES", 0)
    error = failure(write(tmp_path / "a.csv", 'text,label\na,1\n"b,0\nc,1\n'))
    assert error.code == "SOT201"
    assert error.where.endswith("a.csv:3")


def test_tsv_does_not_know_quotes(tmp_path):
    table = read(write(tmp_path / "a.tsv", 'text\tlabel\n"a\t1\nb "\t0\n'))
    assert table.columns["text"] == ['"a', 'b "']


def test_a_huge_field_is_read_and_the_global_limit_is_put_back(tmp_path):
    import csv

    before = csv.field_size_limit(1000)
    try:
        table = read(write(tmp_path / "a.csv", f"text,label\n{'x' * 1_000_000},1\n"))
        assert len(table.columns["text"][0]) == 1_000_000
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_a_column_that_stands_twice_is_refused_only_if_it_is_wanted(tmp_path):
    file = write(tmp_path / "a.csv", "text,other,other\na,1,2\n")
    assert read(file, "text").columns == {"text": ["a"]}
    assert failure(file, "other").code == "SOT203"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_empty_files(tmp_path, name, content):
    assert failure(write(tmp_path / name, content)).code == "SOT202"


def test_a_header_alone_is_no_data(tmp_path):
    assert failure(write(tmp_path / "a.csv", "text,label\n")).code == "SOT202"


def test_missing_columns_are_named_with_what_exists(tmp_path):
    error = failure(write(tmp_path / "a.csv", "texts,label\na,1\n"))
    assert error.code == "SOT203"
    assert "Did you mean 'texts'?" in error.what
    assert "texts, label" in error.fix
    error = failure(write(tmp_path / "a.jsonl", '{"texts": "a", "label": 1}\n'))
    assert error.code == "SOT203"
    assert "texts" in error.what


def test_a_file_without_header_does_not_show_its_first_text_whole(tmp_path):
    error = failure(write(tmp_path / "a.csv", f"{'secret ' * 50},1\nb,0\n"))
    assert "secret " * 8 not in str(error)


def test_json_values(tmp_path):
    rows = [
        {"text": "a", "label": 1},
        {"text": "b", "label": 1.0},
        {"text": "c", "label": 2.5},
        {"text": None, "label": True},
        {"text": "e", "label": None},
        {"label": "f"},
        {"text": {"x": 1}, "label": "g"},
        {"text": "h", "label": float("nan")},
    ]
    table = read(write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows)))
    assert table.columns["text"] == ["a", "b", "c", "", "e", "", "h"]
    assert table.columns["label"] == ["1", "1", "2.5", "true", "", "f", ""]
    assert table.bad == [BadRow(7, "not text")]


def test_bad_json_lines(tmp_path):
    deep = '{"text":' + "[" * 100_000 + "}"
    content = '{"text":"a"}\n\n{"text":\n"b"\n{"text":"\\ud800"}\n' + deep + '\n{"text":"c"}'
    table = read(write(tmp_path / "a.ndjson", content), "text")
    assert table.columns["text"] == ["a", "c"]
    assert [(row.line, row.reason) for row in table.bad] == [
        (3, "not JSON"),
        (4, "not a JSON object"),
        (5, "not UTF-8"),
        (6, "not JSON"),
    ]


def test_a_list_of_documents_becomes_rows_of_one_line(tmp_path):
    content = (
        '{"who":"A","text":["x","y"]}\n{"who":"B","text":[]}\n{"who":["B","C"],"text":"z"}\n{"who":"D","text":"w"}'
    )
    table = read(write(tmp_path / "a.jsonl", content), "text", "who")
    assert table.columns == {"text": ["x", "y", "w"], "who": ["A", "A", "D"]}
    assert table.lines == [1, 1, 4]
    # A row of two owners would stay in the data when one of them is removed.
    assert table.bad == [BadRow(2, "empty text"), BadRow(3, "not text")]
    uneven = read(write(tmp_path / "b.jsonl", '{"text":["x","y"],"label":[1]}\n{"text":["x","y"],"label":[1,0]}'))
    assert uneven.bad == [BadRow(1, "lists of different lengths")]
    assert uneven.columns["label"] == ["1", "0"]


def test_a_json_array(tmp_path):
    file = write(tmp_path / "a.json", '[\n  {"text": "a",\n   "label": 1},\n  7,\n  {"text": "b", "label": 0}\n]\n')
    table = read(file)
    assert table.columns["text"] == ["a", "b"]
    assert table.lines == [2, 5]
    assert table.bad == [BadRow(4, "not a JSON object")]
    for broken in ('[{"text": "a"}', '[{"text": "a"} {"text": "b"}]', '[{"text": ', '[1]\n{"text": "a"}'):
        assert failure(write(tmp_path / "b.json", broken)).code == "SOT201"


def test_parquet_leaves_no_copy(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    columns = {
        "text": ["a", None, "c"],
        "label": [1, 0, 1],
        "bytes": [b"x", b"\xff", b"z"],
        "docs": [["p"], ["q", "r"], []],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = read(tmp_path / "a.parquet")
    assert table.columns == {"text": ["a", "", "c"], "label": ["1", "0", "1"]}
    assert table.lines == [1, 2, 3]
    assert read(tmp_path / "a.parquet", "bytes").bad == [BadRow(2, "not UTF-8")]
    assert failure(tmp_path / "a.parquet", "txt").code == "SOT203"
    assert list(home.rglob("*")) == []
    assert failure(write(tmp_path / "b.parquet", "no parquet")).code == "SOT201"


def test_a_folder_of_documents(tmp_path):
    write(tmp_path / "b.txt", "\ufeffsecond")
    write(tmp_path / "a.txt", "first\nline")
    write(tmp_path / "c.txt", b"\xff")
    write(tmp_path / "._d.txt", "junk of another system")
    table = read(tmp_path, "text", "file")
    assert table.columns == {"text": ["first\nline", "second"], "file": ["a.txt", "b.txt"]}
    assert table.lines == [1, 2]
    assert table.bad == [BadRow(3, "not UTF-8")]


def test_sources_that_do_not_exist_or_are_not_known(tmp_path, monkeypatch):
    write(tmp_path / "train.csv", "text,label\na,1\n")
    error = failure(tmp_path / "trian.csv")
    assert error.code == "SOT200"
    assert "train.csv" in error.what
    assert "no folder" in failure(tmp_path / "nowhere" / "a.csv").what
    assert failure(write(tmp_path / "a.xlsx", "x")).code == "SOT206"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert failure("empty/train").code == "SOT200"  # a misspelt file, not a Hub dataset
    assert failure(tmp_path / "empty").code == "SOT204"
    assert failure(write(tmp_path / "u.csv", "text,label\na,1\n".encode("utf-16"))).code == "SOT201"


def test_the_hub(monkeypatch):
    import datasets

    calls = []

    def fake(name, subset, **options):
        calls.append((name, subset, options))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1], "image": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    table = read("owner/name")
    assert table.columns == {"text": ["a", "b"], "label": ["0", "1"]}
    assert table.lines == [1, 2]
    assert calls == [("owner/name", None, {"split": "train"})]  # and no trust_remote_code

    def offline(*_args, **_options):
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    error = failure("owner/name")
    assert error.code == "SOT205"
    assert "Couldn't reach the Hub" in error.what
    assert "second line" not in error.what


@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from("01")), min_size=1, max_size=8
    )
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_the_csv_and_json_modules_write_is_read_back(tmp_path, rows):
    import csv

    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)
    table = read(tmp_path / "a.csv")
    assert list(zip(table.columns["text"], table.columns["label"], strict=True)) == rows
    assert table.bad == []
    write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t, "label": x}, ensure_ascii=False) for t, x in rows))
    assert read(tmp_path / "a.jsonl").columns == table.columns


@given(st.binary(max_size=200))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_give_a_table_or_a_sotto_error(tmp_path, content):
    for name, head in (
        ("a.csv", b"text,label\n"),
        ("a.tsv", b""),
        ("a.jsonl", b""),
        ("a.json", b"["),
        ("a.parquet", b"PAR1"),
    ):
        try:
            table = read(write(tmp_path / name, head + content))
        except SottoError:
            continue
        else:
            assert len({len(column) for column in table.columns.values()} | {len(table.lines)}) == 1
            assert all(formats.is_unicode(text) for text in table.columns["text"])


def test_sst2_is_read_in_seconds():
    file = SHARED / "data" / "sst2" / "train.tsv"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    start = time.perf_counter()
    table = read(file, "sentence", "label")
    assert time.perf_counter() - start < 10
    assert len(table) == 67_349
    assert table.bad == []
    assert set(table.columns["label"]) == {"0", "1"}


def test_shakespeare_by_speaker():
    file = SHARED / "data" / "shakespeare" / "by_speaker.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    section = DataSection(train="x", text="speeches")
    table = read_table(section, str(file), "train", ["speeches", "speaker"])
    assert len(table) == 7_095
    assert len(set(table.columns["speaker"])) == 299
    assert table.lines[-1] == 299

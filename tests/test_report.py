"""`sotto report`: one page that says what the statement says, holds nothing private, and needs nothing from outside."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

import sotto
from sotto.auditing.bounds import LowerBound
from sotto.auditing.report import AuditReport
from sotto.errors import SottoError
from sotto.privacy.accounting import round_up
from sotto.privacy.statement import Guarantee
from sotto.reporting import charts, page
from sotto.rundir import RunDir


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOTTO_LEDGER_DIR", str(folder / "ledger"))
        return sotto.train(tiny_runs.config(folder, output={"name": "ward <7> & co"})).path


class Words(HTMLParser):
    """The text of a page, and what it would fetch or run."""

    def __init__(self, html: str):
        super().__init__()
        self.words: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "link", "img", "form"):
            self.fetched.append(tag)
        self.fetched += [f"{key}={value}" for key, value in attrs if key in ("src", "href") or key.startswith("on")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_run_ends_with_a_page_that_says_what_its_statement_says(run: Path) -> None:
    words = Words((run / "report.html").read_text(encoding="utf-8"))
    assert not words.open
    statement = flat((run / "statement.txt").read_text())
    promise, how = re.search(r"STATEMENT (.*?) epsilon ", statement), re.search(r"HOW (.*?) THIS DATASET", statement)
    assert promise is not None
    assert how is not None
    for sentence in (promise[1], how[1], *page.statement.NOT_COVERED, page.statement.RELEASED):
        assert sentence in words.text
    facts = json.loads((run / "privacy.json").read_text())
    for value in (f"{facts['noise_multiplier']:.6g}", f"{facts['sampling_prob']:.6g}", "add_or_remove_one", "who"):
        assert value in words.text
    shown = re.search(r"epsilon ([\d.]+), an upper bound", words.text)
    assert shown is not None
    assert facts["epsilon"] <= float(shown[1]) < facts["epsilon"] + 0.0011
    above, found = re.search(r"ε ([\d.]+) of a budget", words.text), re.search(r"([\d.]+) % of members", words.text)
    stated = re.search(r"at most ([\d.]+) % of members", statement)
    assert above is not None
    assert found is not None
    assert stated is not None
    assert above[1] == shown[1]
    assert found[1] == stated[1]
    share = 100 * facts["members_found_at_1_percent_false_alarms"]
    assert share - 1e-3 <= float(found[1]) < share + 0.11
    assert f"without amplification by sampling {round_up(facts['epsilon_without_amplification'])}" in words.text


def test_a_page_fetches_nothing_and_runs_nothing(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    assert Words(html).fetched == []
    assert "url(" not in html
    assert "@import" not in html
    assert Words("<img src='https://example.org/x.png'><a href='y'>z</a>").fetched != []  # the check can fail


def test_a_page_holds_no_path_no_text_and_no_count_of_the_data(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    report = json.loads((run / "private" / "data_report.json").read_text())
    assert str(run.parent.parent) not in html
    assert "notes.csv" not in html
    assert tiny_runs.CANARY not in html
    assert tiny_runs.unit_name(0)[:7] not in html
    assert f"{report['tokens']:,}" not in Words(html).text


def test_names_are_shown_as_they_are_and_never_as_markup(tmp_path: Path) -> None:
    table = tiny_runs.rows()
    unit = "<script>alert(1)</script>"
    tiny_runs.write_csv(tmp_path / "notes.csv", [{unit: row["who"], **row} for row in table])
    done = sotto.train(tiny_runs.config(tmp_path, privacy={"unit": unit}, run={"steps": 1}))
    html = (done.path / "report.html").read_text(encoding="utf-8")
    assert unit not in html
    assert unit in Words(html).text


def test_the_files_of_the_page_are_those_of_the_model(run: Path) -> None:
    import hashlib

    words = Words((run / "report.html").read_text(encoding="utf-8")).text
    for file in (run / "model" / "model.safetensors", run / "statement.txt"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in words


def test_a_run_without_privacy_gets_a_page_that_promises_nothing(tmp_path: Path) -> None:
    done = sotto.train(tiny_runs.config(tmp_path, privacy={"epsilon": "none"}, run={"steps": 1}))
    words = Words((done.path / "report.html").read_text(encoding="utf-8")).text
    assert "NOT PRIVATE" in words
    assert "ε" not in words
    assert "epsilon" not in words.replace("privacy.epsilon", "")


def test_report_writes_where_it_is_told_with_an_audit_beside_the_promise(run: Path, tmp_path: Path) -> None:
    plan = RunDir.open(run).plan()
    claimed = plan.epsilon_after(plan.steps)
    bound = LowerBound("gaussian", 5.25, "noise is Gaussian")
    audit = AuditReport("mechanism", claimed, plan.delta, 0.95, [bound], 4.0, {}, [])
    (tmp_path / "audit.json").write_text(json.dumps(audit.to_dict()))
    to = sotto.report(run, tmp_path / "out" / "page.html", (tmp_path / "audit.json",))
    words = Words(to.read_text(encoding="utf-8")).text
    assert "epsilon at least 5.250" in words
    assert "a bug" not in words
    (tmp_path / "audit.json").write_text(json.dumps(dataclasses.replace(audit, certain=claimed + 0.1).to_dict()))
    sotto.report(run, to, (tmp_path / "audit.json",))
    assert "a bug" in Words(to.read_text(encoding="utf-8")).text


@pytest.mark.parametrize("other", [{"claimed": 3.0}, {"delta": 1e-5}])
def test_an_audit_of_another_configuration_is_refused(run: Path, tmp_path: Path, other: dict[str, float]) -> None:
    plan = RunDir.open(run).plan()
    audit = AuditReport("mechanism", plan.epsilon_after(plan.steps), plan.delta, 0.95, [], 0.0, {}, [])
    (tmp_path / "audit.json").write_text(json.dumps(dataclasses.replace(audit, **other).to_dict()))
    with pytest.raises(SottoError, match=r"(?s)SOT525.*not this run's"):
        sotto.report(run, tmp_path / "page.html", (tmp_path / "audit.json",))
    assert not (tmp_path / "page.html").exists()


def test_an_audit_that_is_not_there_is_named_so(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SottoError, match="SOT525  there is no such file"):
        sotto.report(run, tmp_path / "report.html", (tmp_path / "nope.json",))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"bounds": 3}', "[" * 100_000, '{"attack": "membership"}'],
    ids=["empty", "list", "nothing", "type", "deep", "half"],
)
def test_what_is_no_audit_of_a_configuration_is_refused(run: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "audit.json").write_text(content)
    with pytest.raises(SottoError, match="SOT525"):
        sotto.report(run, tmp_path / "page.html", (tmp_path / "audit.json",))
    assert not (tmp_path / "page.html").exists()


def test_figures_of_private_data_are_refused(run: Path, tmp_path: Path) -> None:
    audit = AuditReport("membership", 7.9, 1e-4, 0.95, [], 0.0, {"examples": 3}, [])
    (tmp_path / "audit.json").write_text(json.dumps(audit.to_dict()))
    with pytest.raises(SottoError, match="functions of private data"):
        sotto.report(run, tmp_path / "page.html", (tmp_path / "audit.json",))


def test_an_unfinished_or_damaged_run_has_no_page(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    (copy / "privacy.json").rename(copy / "kept")
    with pytest.raises(SottoError, match="SOT509"):
        sotto.report(copy)
    (copy / "kept").rename(copy / "privacy.json")
    with open(copy / "model" / "model.safetensors", "r+b") as file:
        file.write(b"x")
    with pytest.raises(SottoError, match="SOT516"):
        sotto.report(copy)


def test_the_curves_are_those_of_the_accountant(run: Path) -> None:
    """No line lies below what the plan's events give, and the last point of the steps is what was earned."""
    folder = RunDir.open(run)
    g = Guarantee.from_facts(folder.plan(), folder.read_json("privacy.json"))
    attack, steps, deltas = (ElementTree.fromstring(svg) for svg in page._promised(g, {"versions": {}})["charts"])

    def drawn(svg: Any, high: float) -> list[float]:
        (line,) = (e for e in svg.iter("polyline") if e.get("class") == "line")
        ups = [float(pair.split(",")[1]) for pair in line.get("points").split()]
        bottom, span = charts.HEIGHT - charts.BOTTOM, charts.HEIGHT - charts.TOP - charts.BOTTOM
        return [high * (bottom - up) / span for up in ups]

    budget = g.plan.epsilon or 0.0
    assert drawn(steps, 1.1 * budget)[-1] == pytest.approx(g.epsilon, abs=0.05)
    for alarm, found in zip(page._between(page.FEWEST_ALARMS, 1.0, 65), drawn(attack, 100), strict=True):
        assert found == pytest.approx(100 * g.detection_rate(alarm), abs=0.4)
        assert g.detection_rate(alarm) >= alarm
    highest = max(g.plan.epsilon_at(g.steps_charged, 10.0**-n, "coarse") for n in range(1, 10))
    assert max(drawn(deltas, 1.05 * highest)) == pytest.approx(highest, rel=0.02)


def test_charts_escape_their_words_and_leave_out_what_is_not_finite() -> None:
    axis = charts.Axis("<b>", 0, 10, charts.round_ticks(0, 10))
    svg = ElementTree.fromstring(
        charts.line_chart('a "b" <c>', axis, axis, [charts.Line("<i>", [(0, 0), (5, math.inf), (10, 99)])])
    )
    assert [e.text for e in svg.iter("text") if e.get("class") == "axis"] == ["<b>", "<b>"]
    (line,) = svg.iter("polyline")
    points = [tuple(map(float, p.split(","))) for p in str(line.get("points")).split()]
    assert points == [(charts.LEFT, charts.HEIGHT - charts.BOTTOM), (charts.WIDTH - charts.RIGHT, charts.TOP)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 7.3), (0, 43_112), (0, 1e-3), (0, 100)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = charts.round_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low <= value <= high * (1 + 1e-9) for value, _ in ticks)
    assert all(float(text) == pytest.approx(value) for value, text in ticks)

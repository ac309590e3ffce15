"""Scores on private data: sensitivity, noise, what is charged, and to whom."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from scipy import stats

import sotto
from sotto import cli, noisy_scores
from sotto.data.load import load_dataset_for
from sotto.errors import SottoError
from sotto.evaluation import exported_model
from sotto.noisy_scores import GRID, SENSITIVITY, release, summed, unit_scores
from sotto.privacy.datasets import require_one_name
from sotto.privacy.ledger import Ledger

Z = 1.7


def test_one_unit_moves_the_pair_by_no_more_than_stated() -> None:
    generator = random.Random(0)
    odd = [math.nan, math.inf, -math.inf, 1e300, -5.0, 0.0, 1.0, 0.5]
    widest = 0.0
    for _ in range(10_000):
        scores = [generator.choice(odd) if generator.random() < 0.5 else generator.random() for _ in range(4)]
        left = scores.copy()
        left.pop(generator.randrange(4))
        moved = math.dist(summed(scores), summed(left))
        other = [*left, generator.choice(odd)]
        assert math.dist(summed(scores), summed(other)) <= 2 * GRID <= 2 * SENSITIVITY, "replaced by another"
        widest = max(widest, moved)
    assert widest <= SENSITIVITY
    assert widest > 0.999 * SENSITIVITY, "the bound is not loose either"


def test_the_noise_is_that_of_the_event() -> None:
    scores = [0.25] * 500
    drawn = np.array([release(scores, Z)[0] for _ in range(2000)])
    # With many units the quotient is linear in both noises.
    ratio, expected = 2 * 0.25 - 1, Z * math.sqrt(2) / 500
    z = (2 * drawn - 1 - ratio) / (expected * math.sqrt(1 + ratio**2))
    assert stats.kstest(z, "norm").pvalue > 1e-7
    spread = 7 / math.sqrt(2 * len(z))  # seven standard errors
    assert z.std() == pytest.approx(1.0, rel=spread)
    assert z.std() * 1.25 != pytest.approx(1.0, rel=spread), "a wrong scale is noticed"
    inside = np.abs(drawn - 0.25) <= [release(scores, Z)[1]] * len(drawn)
    assert 0.92 < inside.mean() < 0.98


def test_few_units_give_a_score_that_is_still_one() -> None:
    for _ in range(200):
        score, margin, units = release([1.0], 50.0)
        assert 0.0 <= score <= 1.0
        assert margin > 0
        assert units >= 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run for each task with units, and held-out people."""
    folder = tmp_path_factory.mktemp("noisy")
    held = [{**row, "who": row["who"] + "-held"} for row in tiny_runs.rows(units=40, seed=9)]
    tiny_runs.write_csv(folder / "held.csv", held)
    found: dict[str, Any] = {"folder": folder, "held": str(folder / "held.csv")}
    for kind in ("classification", "completion"):
        config = tiny_runs.config(folder, kind)
        found[kind] = (config, sotto.train(config).path)
    return found


@pytest.fixture(autouse=True)
def _ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOTTO_LEDGER_DIR", str(tmp_path / "ledgers"))


@pytest.mark.parametrize("kind", ["classification", "completion"])
def test_units_are_scored_as_one_by_one(place: dict[str, Any], kind: str) -> None:
    config, path = place[kind]
    assert config.privacy.unit == "who"
    model, tokenizer = exported_model(path)
    given = config.model_copy(update={"data": config.data.model_copy(update={"train": place["held"]})})
    loaded = load_dataset_for(given, tokenizer, "train", whole=False)
    found = unit_scores(model, tokenizer, given, loaded, 7)
    assert len(found) == len(loaded.units)
    for unit in (0, 3, len(found) - 1):
        members, _ = loaded.units.members_of(np.array([unit]))
        right, wrong, tokens = 0, 0.0, 0
        for member in members:
            batch = loaded.examples.collate(np.array([member]), tokenizer.pad_token_id)
            labels = batch.pop("labels")
            logits = model(**batch).logits[0].detach().double()
            if kind == "classification":
                right += int(logits.argmax() == labels[0])
            else:
                for place_, label in enumerate(labels[0, 1:].tolist()):
                    if label != -100:
                        wrong += min(-float(logits[place_].log_softmax(-1)[label]), math.log(logits.shape[-1]))
                        tokens += 1
        slow = right / len(members) if kind == "classification" else 1 - wrong / tokens / math.log(logits.shape[-1])
        assert found[unit] == pytest.approx(slow, abs=1e-5)


def test_a_score_has_the_noise_that_the_relation_of_its_run_needs(tmp_path: Path) -> None:
    """A unit that is replaced moves the pair twice as far as one that is removed."""
    privacy = {"neighboring_relation": "replace_one"}
    path = sotto.train(tiny_runs.config(tmp_path, method={"train": "head"}, privacy=privacy)).path
    held = tiny_runs.write_csv(tmp_path / "held.csv", tiny_runs.rows(20, seed=8))
    found = sotto.evaluate(path, held, epsilon=1.0, delta=1e-4)
    assert 0.999 < found["epsilon"] <= 1.0
    (entry,) = (run for run in _scores() if run["kind"] == "open")
    event, relation = noisy_scores.Gaussian(entry["event"]["noise_multiplier"]), entry["neighboring_relation"]
    assert relation == "replace_one"
    spent = sotto.privacy.accounting.composed_epsilon([(event, 1)], 1e-4, relation)
    assert spent == pytest.approx(found["epsilon"])
    assert event.noise_multiplier > 1.9 * sotto.privacy.accounting.noise_multiplier(1.0, 1.0, 1, 1e-4)


def _scores() -> list[dict[str, Any]]:
    """The entries of all ledgers that are about scores."""
    books = sotto.privacy.ledger.ledger_dir().glob("*.jsonl")
    entries = [json.loads(line) for book in books for line in book.read_text().splitlines()]
    return [entry for entry in entries if str(entry.get("run", "")).startswith("score-")]


def test_a_noisy_score_is_charged_to_the_data_that_it_is_about(place: dict[str, Any]) -> None:
    config, path = place["classification"]
    first = sotto.evaluate(path, place["held"], epsilon=1.0, delta=1e-4)
    assert set(first) == {"accuracy", "margin_95", "units", "epsilon", "delta"}
    assert 0 < first["epsilon"] <= 1.0
    assert first["epsilon"] > 0.999
    of_held = config.model_copy(
        update={
            "data": config.data.model_copy(update={"train": place["held"]}),
            "privacy": config.privacy.model_copy(update={"num_units": 40}),
        }
    )
    assert sotto.ledger(of_held)["total"] == pytest.approx(
        sotto.privacy.accounting.composed_epsilon(
            [(noisy_scores.Gaussian(sotto.privacy.accounting.noise_multiplier(1.0, 1.0, 1, 1e-4)), 1)],
            config.privacy.delta,
        )
    )
    assert sotto.ledger(config)["total"] == 0, "the training data was not asked"
    second = sotto.evaluate(path, place["held"], epsilon=1.0, delta=1e-4)
    assert second != first
    once = sotto.ledger(of_held)["total"]
    sotto.ledger(of_held, epsilon=once * 1.01)
    with pytest.raises(SottoError) as caught:
        sotto.evaluate(path, place["held"], epsilon=1.0, delta=1e-4)
    assert caught.value.code == "SOT414"
    assert sotto.ledger(of_held)["total"] == once


def test_a_score_is_charged_where_its_texts_are_known_under_a_name(place: dict[str, Any]) -> None:
    """Else two ledgers would each know a part of what was spent on them."""
    config, path = place["classification"]
    model_and_tokenizer = exported_model(path)
    given = config.model_copy(update={"data": config.data.model_copy(update={"train": place["held"]})})
    texts = load_dataset_for(given, model_and_tokenizer[1], "train", whole=False).fingerprint
    require_one_name("clinic.who", texts)
    named = Ledger.open("clinic.who")
    named.open_run("earlier", noisy_scores.Gaussian(1.0), 1, delta=1e-5)
    with pytest.raises(SottoError) as caught:
        sotto.evaluate(path, place["held"], epsilon=1.0)
    assert caught.value.code == "SOT417"
    assert _scores() == [], "nothing was charged, and nothing was computed"


def test_with_little_noise_it_is_the_exact_score(place: dict[str, Any]) -> None:
    _, path = place["completion"]
    noisy = sotto.evaluate(path, place["held"], epsilon=1e6)
    assert noisy["units"] == 40
    assert noisy["nats_per_token"] == pytest.approx(sotto.evaluate(path, place["held"])["nats_per_token"], rel=0.1)


def test_a_score_that_cannot_be_computed_stays_charged(place: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = place["classification"]

    def broken(*arguments: Any) -> list[float]:
        raise MemoryError

    monkeypatch.setattr(noisy_scores, "unit_scores", broken)
    with pytest.raises(MemoryError):
        sotto.evaluate(path, place["held"], epsilon=1.0)
    of_held = config.model_copy(update={"data": config.data.model_copy(update={"train": place["held"]})})
    assert sotto.ledger(of_held)["total"] > 0.9


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, None), (-1.0, None), (math.nan, None), (1.0, 0.0), (1.0, 1.0)])
def test_no_score_without_a_price(place: dict[str, Any], epsilon: float, delta: float | None) -> None:
    with pytest.raises(SottoError) as caught:
        sotto.evaluate(place["classification"][1], place["held"], epsilon=epsilon, delta=delta)
    assert caught.value.code == "SOT401"


def test_the_units_column_has_to_be_there(place: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": row["label"]} for row in tiny_runs.rows(units=10)]
    path = tiny_runs.write_csv(tmp_path / "nobody.csv", rows)
    assert "accuracy" in sotto.evaluate(place["classification"][1], str(path))
    with pytest.raises(SottoError, match="who"):
        sotto.evaluate(place["classification"][1], str(path), epsilon=1.0)


def test_on_the_command_line(
    place: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(place["classification"][1])
    monkeypatch.setattr(sys, "argv", ["sotto", "evaluate", path, "--data", place["held"], "--epsilon", "2", "--json"])
    cli.main()
    found = json.loads(capsys.readouterr().out)
    assert found["epsilon"] <= 2.0
    assert "loss" not in found

"""Every attack has to succeed where nothing is hidden, and to fail where everything is."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_split_run
import tiny_models
import tiny_runs
import torch

from sotto import cli, config_file
from sotto.auditing.split import SplitReport, audit_customer, audit_split
from sotto.data.load import load_dataset_for
from sotto.errors import SottoError
from sotto.privacy.noise import DebugNoise
from sotto.split import bags, exact, inference, inversion, nearest
from sotto.split.customer import Customer, load_bottom
from sotto.split.labels import LabelKeeper
from sotto.split.view import View, best, look, rare, rouge, success

pytestmark = pytest.mark.xdist_group("split attacks")  # their audits are kept, for all tests of one process
PLACE: list[Path] = []
OPEN = {"privatizer": "none", "layer": 1}
HIDDEN = {"privatizer": "dx_hidden", "eta": 0.5, "layer": 1}
BASE = {"privatizer": "none", "layer": 0}


@pytest.fixture(scope="module", autouse=True)
def _place(tmp_path_factory: pytest.TempPathFactory) -> None:
    PLACE[:] = [tmp_path_factory.mktemp("attacks")]
    tiny_runs.write_csv(PLACE[0] / "notes.csv", tiny_runs.rows(units=200))


def config(setting: dict[str, Any]) -> Any:
    return test_split_run.config(PLACE[0], setting, privacy={"num_units": 600})


@cache
def audited(setting: str) -> SplitReport:
    return audit_split(config(json.loads(setting)), limit=250, passes=9, noise=DebugNoise(1))


def report(setting: dict[str, Any]) -> SplitReport:
    return audited(json.dumps(setting))


ATTACKS = ["linear inversion", "learned inversion", "search", "context correction"]


@pytest.mark.parametrize(("attack", "setting"), [("nearest neighbour", BASE), *((a, OPEN) for a in ATTACKS)])
def test_each_inversion_succeeds_on_the_undefended_model(attack: str, setting: dict) -> None:
    found = report(setting)
    assert found.recovered[attack] > 0.8
    assert found.baseline < 0.3


@pytest.mark.parametrize("attack", ["nearest neighbour", *ATTACKS])
def test_no_inversion_beats_noise_that_hides_everything(attack: str) -> None:
    found = report(HIDDEN)
    assert found.recovered[attack] < found.baseline + 0.1


def causal_customer(layer: int = 1, privatizer: str = "none") -> tuple[Customer, View, inversion.Trained]:
    """A customer of a causal model, some of what it sends, and a weak attack that ranks the tokens."""
    folder = PLACE[0] / "llama"
    if not folder.exists():
        tiny_models.save("llama", folder)
    values = {"model": {"name": str(folder)}, "privacy": {"num_units": 600}}
    eta = {"eta": 1.0} if privatizer == "dx_hidden" else {}
    made = test_split_run.config(PLACE[0], {"privatizer": privatizer, "layer": layer, **eta}, **values)
    bottom, tokenizer = load_bottom(made)
    customer = Customer(made, bottom, tokenizer, DebugNoise(0))
    customer.settle(load_dataset_for(made, tokenizer, "train"))
    known = look(customer, customer.data.examples, np.arange(100, 140))
    return (
        customer,
        look(customer, customer.data.examples, np.arange(8)),
        inversion.train_inverter(lambda: known, lambda v: v.values, 1),
    )


def test_the_exact_search_finds_every_token_behind_a_causal_bottom() -> None:
    customer, target, weak = causal_customer()
    assert exact.is_causal(customer.bottom)
    assert success(weak.guess(target), target) < 0.6, "it is the search that finds them"
    assert success(exact.search(target, customer.bottom, weak), target) == 1.0
    assert not exact.is_causal(load_bottom(config(OPEN))[0])
    _, noised, weak = causal_customer(privatizer="dx_hidden")
    assert success(exact.search(noised, customer.bottom, weak), noised) < 0.3, "noise stops it at once"


def test_the_exact_search_is_part_of_the_audit_where_it_applies() -> None:
    folder = PLACE[0] / "llama"
    if not folder.exists():
        tiny_models.save("llama", folder)
    changes = {"model": {"name": str(folder)}, "privacy": {"num_units": 600}}
    found = audit_split(test_split_run.config(PLACE[0], OPEN, **changes), limit=60, passes=2, noise=DebugNoise(1))
    assert found.recovered["exact search"] == 1.0
    assert found.empirical_privacy == 0.0
    assert found.rouge["exact search"] == 1.0
    assert "exact search" not in report(OPEN).recovered


def test_rouge_is_the_longest_common_subsequence_over_the_length() -> None:
    ids = torch.tensor([[9, 1, 2, 3, 4], [9, 5, 6, 0, 0], [9, 9, 0, 0, 0]])
    mask = (ids > 0).long()
    counted = mask.bool() & (ids != 9)
    view = View(torch.zeros(3, 5, 2), ids, mask, counted, torch.zeros_like(counted), torch.zeros(3))
    assert rouge(ids, view) == 1.0
    guess = torch.tensor([[8, 7, 1, 2, 4], [8, 6, 5, 1, 1], [1, 1, 1, 1, 1]])
    assert rouge(guess, view) == pytest.approx((3 / 4 + 1 / 2) / 2), "a shift costs one, a swap one; no text, no score"
    assert rouge(torch.full_like(ids, 8), view) == 0.0
    assert rouge(ids, dataclasses.replace(view, counted_ET=torch.zeros_like(counted))) == 0.0


def test_rare_tokens_are_those_of_few_known_texts() -> None:
    ids = torch.tensor([[1, 2, 2], [1, 3, 0], [1, 2, 0]])
    view = View(torch.zeros(3, 3, 2), ids, (ids > 0).long(), ids > 0, ids > 99, torch.zeros(3))
    assert rare(view, 6, share=0.4).tolist() == [True, False, False, True, True, True]
    found = report(OPEN)
    assert found.rare.keys() == found.recovered.keys()
    assert found.rouge["learned inversion"] > 0.8
    assert report({"privatizer": "dx_pooled", "eta": 1e7}).rouge == {}
    truth = torch.tensor([[True, True, False]])
    scores, seldom = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([False, True, True])
    assert bags.named(best(scores, 3), truth, seldom) == 0.0
    assert bags.named(best(scores, 3), truth, ~seldom) == 1.0


def test_depth_hides_from_the_nearest_neighbour_alone() -> None:
    found = report(OPEN)
    assert found.recovered["nearest neighbour"] < found.recovered["learned inversion"]
    assert found.empirical_privacy == 1 - max(found.recovered.values())
    assert found.strongest != "nearest neighbour"


def test_the_class_is_inferred_where_nothing_is_hidden_and_guessed_where_all_is() -> None:
    assert report(OPEN).attribute > 0.8
    assert report(OPEN).attribute_baseline < 0.6
    assert report(HIDDEN).attribute < report(HIDDEN).attribute_baseline + 0.15


def test_substituted_tokens_are_what_the_nearest_neighbour_sees() -> None:
    found = report({"privatizer": "dx_tokens", "eta": 1e4})
    assert found.recovered["nearest neighbour"] == 1.0
    assert found.recovered.keys() == {"nearest neighbour", "learned inversion"}
    lost = report({"privatizer": "dx_tokens", "eta": 0.05})
    assert lost.recovered["nearest neighbour"] < 0.2


def test_exempt_words_are_reported_apart() -> None:
    (PLACE[0] / "words.txt").write_text("w40\nw41\nw42\n")
    listed = {"exempt": "list", "exempt_file": str(PLACE[0] / "words.txt")}
    found = report({"privatizer": "dx_tokens", "eta": 0.05, **listed})
    assert 0.05 < found.exempt < 0.3
    assert found.recovered["nearest neighbour"] < 0.2, "they would raise it, if they counted"
    assert found.attribute > 0.9, "the words that tell the class were sent as they are"
    assert "exempt words" in found.render()


BAG_ATTACKS = {
    "nearest neighbour": 0.4,
    "matching pursuit": 0.35,
    "linear pursuit": 0.5,
    "linear inversion": 0.85,
    "learned inversion": 0.7,
}
"""What each names of the words of a text that one unhidden row of 16 numbers stands for."""
SEGMENTS = {"privatizer": "dx_pooled", "segment": 2, "eta": 1e7}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("attack", BAG_ATTACKS)
def test_each_attack_on_one_row_names_words_where_nothing_is_hidden(attack: str, layer: int) -> None:
    found = report({"privatizer": "dx_pooled", "eta": 1e7, "layer": layer})
    assert found.recovered.keys() == BAG_ATTACKS.keys()
    assert found.recovered[attack] > BAG_ATTACKS[attack]
    assert found.baseline < 0.3
    assert found.attribute > 0.8
    assert "one row was sent" in found.render()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("attack", BAG_ATTACKS)
def test_each_attack_on_segments_names_words_where_nothing_is_hidden(attack: str, layer: int) -> None:
    found, whole = report({**SEGMENTS, "layer": layer}), report({"privatizer": "dx_pooled", "eta": 1e7, "layer": layer})
    assert found.recovered.keys() == BAG_ATTACKS.keys()
    assert found.recovered[attack] > max(BAG_ATTACKS[attack], found.baseline + 0.2)
    assert max(found.recovered.values()) >= max(whole.recovered.values()) - 0.05
    assert found.rouge == {}
    assert found.attribute > 0.8
    assert "one row was sent for each 2 tokens" in found.render()


def test_a_row_is_told_from_the_rows_beside_it() -> None:
    """Those that learn see three rows; at the embeddings the other two tell nothing of the words of the one."""
    made = config({**SEGMENTS, "segment": 3, "layer": 1})
    bottom, tokenizer = load_bottom(made)
    customer = Customer(made, bottom, tokenizer, DebugNoise(0))
    customer.settle(load_dataset_for(made, tokenizer, "train"))
    chosen = np.array([5, 0, 9, 31])
    view = look(customer, customer.data.examples, chosen)
    rows, place = view.by_segment(), 0
    assert rows.pooled
    assert rows.by_segment() is rows
    for text, example in enumerate(chosen.tolist()):
        start, end = customer.data.examples.offsets[example : example + 2]
        ids = customer.data.examples.input_ids[start:end].tolist()
        count = max(1, len(ids) // 3)
        assert int(view.rows_E[text]) == count
        for row in range(count):
            tokens = ids[3 * row : 3 * row + 3 if row + 1 < count else len(ids)]
            assert rows.ids_ET[place][rows.mask_ET[place].bool()].tolist() == tokens
            assert rows.counted_ET[place].tolist() == [
                t < len(tokens) and tokens[t] not in customer.special for t in range(rows.ids_ET.shape[1])
            ]
            assert torch.equal(rows.values[place, 0], view.values[text, row])
            assert rows.around_E2n is not None
            nothing = torch.zeros(bottom.width)
            before = view.values[text, row - 1] if row else nothing
            behind = view.values[text, row + 1] if row + 1 < count else nothing
            assert torch.equal(rows.around_E2n[place], torch.stack([before, behind]))
            assert int(rows.labels_E[place]) == int(view.labels_E[text])
            place += 1
    assert place == len(rows.ids_ET)


def test_the_nearest_neighbour_takes_the_measure_that_finds_most() -> None:
    generator = torch.Generator().manual_seed(0)
    bottom, _ = load_bottom(config(OPEN))
    tokens = torch.arange(5, 60)
    ids = tokens[torch.randint(len(tokens), (40, 6), generator=generator)]
    mask = torch.ones_like(ids)
    alone = nearest.alone(bottom, torch.arange(len(bottom.table_Vn)))
    table = bottom.table_Vn
    away = 3 * torch.randn(bottom.width, generator=generator)
    given = {
        "distance": alone[ids],
        "angle": 0.2 * (alone - alone[tokens].mean(dim=0))[ids] + away,
        "angle to the embedding": 0.2 * (table - table[tokens].mean(dim=0))[ids] + away,
    }
    for name, values in given.items():
        view = View(values, ids, mask, mask.bool(), mask > 1, torch.zeros(40))
        found = nearest.Nearest(bottom, tokens, view)
        scored = {
            m.name: found._success(m, view) for m in nearest.measures(bottom, tokens, values.flatten(0, 1).mean(0))
        }
        assert scored[found.measure.name] == max(scored.values())
        assert scored[name] > 0.9 * ids.numel()
        assert success(found.guess(view), view) > 0.9
    assert scored["distance"] < 0.5 * ids.numel(), "the obvious measure would have looked like privacy"


@pytest.mark.parametrize(
    "setting",
    [
        {"privatizer": "dx_pooled", "eta": 0.5, "layer": 1},
        {"privatizer": "dx_pooled", "segment": 2, "eta": 0.5, "layer": 1},
        {"privatizer": "gaussian_pooled", "epsilon": 0.5, "layer": 1},
    ],
)
def test_no_attack_on_one_row_beats_noise_that_hides_everything(setting: dict) -> None:
    found = report(setting)
    assert max(found.recovered.values()) < found.baseline + 0.1
    assert found.attribute < 0.65


def test_matching_pursuit_takes_a_sum_apart() -> None:
    torch.manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(400, 128), dim=1)
    held = [3, 77, 200, 399, 12]
    weights = torch.tensor([1.0, 0.7, 1.3, 0.9, 1.1])
    row = (weights[:, None] * table[held]).sum(0)
    found = bags.pursue(torch.stack([row, table[7]]), table, torch.tensor([5, 1]))
    assert sorted(found[0].tolist()) == sorted(held)
    assert found[1].tolist() == [7, -1, -1, -1, -1]
    assert bags.pursue(table[:0], table, torch.tensor([])).shape == (0, 0)
    assert bags.pursue(table[:1], table, torch.tensor([0])).shape == (1, 0)


def test_words_are_counted_once_and_as_many_named_as_there_are() -> None:
    ids = torch.tensor([[9, 1, 1, 2], [9, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    counted = mask.bool() & (ids != 9)
    view = View(torch.zeros(2, 1, 4), ids, mask, counted, torch.zeros_like(counted), torch.zeros(2), 0)
    assert view.pooled
    truth = bags.bags(view, 10)
    assert truth.nonzero().tolist() == [[0, 1], [0, 2], [1, 3]]
    scores = torch.zeros(2, 10)
    scores[0, [1, 5, 2]] = torch.tensor([3.0, 2.0, 1.0])  # the second of two is wrong
    scores[1, 3] = 1.0
    assert bags.named(best(scores, 2), truth) == pytest.approx(2 / 3)
    assert bags.named(best(truth.float(), 2), truth) == 1.0
    assert bags.named(best(scores, 2), torch.zeros_like(truth)) == 0.0
    twice = dataclasses.replace(view, ids_ET=torch.tensor([[9, 1, 1, 2], [9, 1, 2, 0]]), counted_ET=counted[[0, 0]])
    assert bags.commonest(twice, view, 10) == pytest.approx(2 / 3), "words 1 and 2 are common there, and 3 is not"


def test_more_rows_than_tokens_are_aligned_with_the_tokens() -> None:
    found = report({"privatizer": "gaussian", "epsilon": 1e9, "layer": 1, "clip_norm": 1000.0})
    assert found.recovered["learned inversion"] > 0.8


@pytest.mark.parametrize(("epsilon", "least", "most"), [(500.0, 1.0, 1.0), (0.1, 0.0, 0.65)])
def test_labels_are_inferred_from_answers_without_noise(epsilon: float, least: float, most: float) -> None:
    labels = torch.arange(300) % 2
    keeper = LabelKeeper(labels, 2, 3, epsilon, 1e-5, DebugNoise(0))
    assert least <= inference.infer_labels(keeper, labels, 2) <= most


def test_the_report_says_what_it_attacked() -> None:
    kept = report({**OPEN, "labels": "kept", "label_epsilon": 400.0})
    assert kept.labels == 1.0
    assert report(OPEN).labels is None
    assert "learned inversion" in kept.render()
    assert kept.to_dict()["strongest"] == kept.strongest
    assert not kept.bug


def test_attacked_and_known_texts_are_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []

    def watch(customer: Customer, examples: Any, chosen: np.ndarray) -> View:
        seen.append(set(chosen.tolist()))
        return look(customer, examples, chosen)

    monkeypatch.setattr("sotto.auditing.split.look", watch)
    audit_split(config(BASE), limit=50, passes=1)
    target, *known = seen
    assert len(target) == 10
    assert known
    assert not any(target & other for other in known)


@pytest.mark.parametrize("setting", [OPEN, {"privatizer": "dx_pooled", "eta": 9.0, "layer": 1}])
def test_the_searches_can_be_left_out(setting: dict) -> None:
    made = config(setting)
    bottom, tokenizer = load_bottom(made)
    customer = Customer(made, bottom, tokenizer, DebugNoise(0))
    customer.settle(load_dataset_for(made, tokenizer, "train"))
    found = audit_customer(customer, limit=40, passes=1, searched=0)
    learnt = {"nearest neighbour", "linear inversion", "learned inversion"}
    assert found.recovered.keys() - {"linear pursuit"} == learnt
    assert ("linear pursuit" in found.recovered) == (setting["privatizer"] == "dx_pooled")


def test_a_view_holds_what_was_sent_in_its_place() -> None:
    made = config(OPEN)
    bottom, tokenizer = load_bottom(made)
    customer = Customer(made, bottom, tokenizer, DebugNoise(0))
    data = load_dataset_for(made, tokenizer, "train")
    customer.settle(data)
    view = look(customer, data.examples, np.array([5, 0, 9]))
    batch = data.examples.collate(np.array([5, 0, 9]), 0)
    batch.pop("labels")
    hidden = bottom.hidden(batch) * batch["attention_mask"].unsqueeze(-1)
    assert torch.allclose(view.values, hidden, atol=2e-3)
    assert torch.equal(view.ids_ET, batch["input_ids"])
    special = torch.isin(view.ids_ET, torch.tensor(customer.special))
    assert torch.equal(view.counted_ET, batch["attention_mask"].bool() & ~special)
    assert success(view.ids_ET, view) == 1.0
    assert success(view.ids_ET + 1, view) == 0.0
    part = view.part(torch.tensor([1]))
    assert part.values.shape[1] == int(view.mask_ET[1].sum())


def test_the_search_without_a_bottom_that_fits_finds_less() -> None:
    """The gradient search really fits representations: through another model's bottom it goes astray."""
    made = config(OPEN)
    bottom, tokenizer = load_bottom(made)
    customer = Customer(made, bottom, tokenizer, DebugNoise(0))
    data = load_dataset_for(made, tokenizer, "train")
    customer.settle(data)
    target = look(customer, data.examples, np.arange(20))
    known = np.arange(20, 200)
    weak = inversion.train_inverter(lambda: look(customer, data.examples, known), lambda v: v.values, 1)
    start = success(weak.guess(target), target)
    right = success(inversion.search(target, bottom, weak), target)
    with torch.no_grad():
        for parameter in bottom.model.parameters():
            if parameter.numel():
                parameter.copy_(parameter.flip(0))
    wrong = success(inversion.search(target, bottom, weak), target)
    assert right > max(start, wrong) + 0.2


def test_too_few_texts_are_refused() -> None:
    folder = PLACE[0] / "few"
    folder.mkdir()
    tiny_runs.write_csv(folder / "notes.csv", tiny_runs.rows(units=2))
    made = test_split_run.config(folder, BASE, privacy={"num_units": 6}, run={"expected_batch_size": 2})
    with pytest.raises(SottoError) as caught:
        audit_split(made)
    assert caught.value.code == "SOT706"


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = PLACE[0] / "recipe.yaml"
    path.write_text(config_file.dump(config(BASE).to_dict()), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["sotto", "audit", "--split", str(path), "--limit", "40", "--json"])
    cli.main()
    assert json.loads(capsys.readouterr().out)["recovered"]["nearest neighbour"] > 0.8
    kept = {**OPEN, "labels": "kept", "label_epsilon": 400.0}
    path.write_text(config_file.dump(config(kept).to_dict()), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["sotto", "audit", "--split", str(path), "--limit", "40", "--json"])
    cli.main()
    told = json.loads(capsys.readouterr().out)
    assert told["recovered"].keys() == told["rare"].keys() == told["rouge"].keys() == {"nearest neighbour", *ATTACKS}
    assert told["labels"] == 1.0
    assert 0.0 <= told["attribute"] <= 1.0, "whether it succeeds is tested above, with more texts"
    plain = tiny_runs.write_yaml(PLACE[0])
    monkeypatch.setattr("sys.argv", ["sotto", "audit", "--split", str(plain)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "SOT800" in capsys.readouterr().err

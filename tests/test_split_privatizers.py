"""What leaves: each privatizer against its law, and against what a careless one would do."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from scipy import stats

from sotto.config_split import SplitSetting
from sotto.errors import SottoError
from sotto.privacy.noise import DebugNoise, SecureNoise
from sotto.split import privatizers, statement
from sotto.split.metric import meaning, nearest
from sotto.split.privatizers import Batch, GaussianRelease, HiddenNoise, Plain, PooledNoise, TokenSubstitution, make

WIDTH, VOCAB, SPECIAL = 16, 60, [0, 1, 2]


def table() -> torch.Tensor:
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(3))


def batch(lengths: tuple[int, ...] = (5, 3), seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    most = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), most), generator=generator)
    ids[:, 0] = 1
    mask = (torch.arange(most) < torch.tensor(lengths)[:, None]).long()
    return Batch(ids * mask, mask, table()[ids * mask])


def test_nothing_is_done_by_none() -> None:
    out = Plain().release(batch(), DebugNoise(0), 0)
    assert out.lengths_B.tolist() == [5, 3]
    given = batch()
    assert given.hidden_BTn is not None
    assert torch.equal(out.rows, torch.cat([given.hidden_BTn[0], given.hidden_BTn[1, :3]]).half())


def test_each_row_has_its_own_noise_of_the_right_length() -> None:
    many, plain = batch((9,) * 400), Plain()
    noised = (
        HiddenNoise(50.0).release(many, SecureNoise(), 0).rows.double() - plain.release(many, DebugNoise(0), 0).rows
    )
    # Rounding to float16 moves each number by about 1e-3, far less than the noise of mean length 0.32.
    p = stats.kstest(noised.norm(dim=1).numpy(), stats.gamma(a=WIDTH, scale=1 / 50.0).cdf).pvalue
    assert p > 1e-6
    wrong = stats.kstest(noised.norm(dim=1).numpy(), stats.gamma(a=WIDTH, scale=1 / 60.0).cdf).pvalue
    assert wrong < 1e-6


def test_a_mean_has_one_noise_of_the_right_length_and_knows_no_padding() -> None:
    many = batch((9, 4) * 400)
    assert many.hidden_BTn is not None
    means = torch.stack([h[:n].double().mean(0) for h, n in zip(many.hidden_BTn, many.mask_BT.sum(1), strict=True)])
    released = PooledNoise(50.0).release(many, SecureNoise(), 0)
    assert released.lengths_B.tolist() == [1] * 800
    lengths = (released.rows.double() - means).norm(dim=1).numpy()
    assert stats.kstest(lengths, stats.gamma(a=WIDTH, scale=1 / 50.0).cdf).pvalue > 1e-6
    assert stats.kstest(lengths, stats.gamma(a=WIDTH, scale=1 / 60.0).cdf).pvalue < 1e-6


def slow_segments(text: torch.Tensor, segment: int) -> list[torch.Tensor]:
    """Cuts one text by hand: whole segments from the left, and what is left over joins the last one."""
    pieces = [text[start : start + segment] for start in range(0, len(text), segment)]
    if len(pieces) > 1 and len(pieces[-1]) < segment:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return pieces


@pytest.mark.parametrize("segment", [2, 3, 4])
def test_segments_are_cut_from_the_left_and_a_rest_joins_the_last(segment: int) -> None:
    lengths = (1, 2, 3, 4, 5, 7, 11)
    given = batch(lengths)
    assert given.hidden_BTn is not None
    out = PooledNoise(1e9, segment).release(given, DebugNoise(0), 0)
    texts = [slow_segments(text[:n].double(), segment) for text, n in zip(given.hidden_BTn, lengths, strict=True)]
    assert out.lengths_B.tolist() == [len(pieces) for pieces in texts]
    assert all(segment <= len(piece) < 2 * segment for pieces in texts[3:] for piece in pieces)
    slow = torch.stack([piece.mean(dim=0) for pieces in texts for piece in pieces])
    assert torch.allclose(out.rows.double(), slow, atol=2e-3)
    shifted = torch.stack([piece.mean(dim=0) for text, n in zip(given.hidden_BTn, lengths, strict=True)
                           for piece in slow_segments(text[:n].double().flip(0), segment)])  # fmt: skip
    assert not torch.allclose(out.rows.double(), shifted, atol=2e-3), "the end that a rest joins is told from the other"


@pytest.mark.parametrize("segment", [2, 3, 5])
def test_one_token_moves_the_means_by_its_share_at_most(segment: int) -> None:
    """What the guarantee at the embeddings rests on: another token at distance d moves all means by d / m together."""
    largest = 0.0
    for length in range(segment, 4 * segment):
        first = batch((length,))
        for place in range(length):
            second = batch((length,))
            assert first.hidden_BTn is not None
            assert second.hidden_BTn is not None
            second.hidden_BTn[0, place] += 100.0 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(place))
            apart = float((second.hidden_BTn - first.hidden_BTn).double().norm())
            rows = [PooledNoise(1e12, segment).release(b, DebugNoise(0), 0).rows.double() for b in (first, second)]
            moved = float((rows[0] - rows[1]).norm(dim=1).sum())
            assert moved <= apart / segment * (1 + 2e-3)
            largest = max(largest, moved / apart)
    assert largest > 0.99 / segment, "the bound is reached, so less noise would not do"


def test_each_segment_has_its_own_noise_of_the_right_length() -> None:
    many = batch((9, 4) * 300)
    assert many.hidden_BTn is not None
    plain = PooledNoise(1e12, 3).release(many, DebugNoise(0), 0)
    released = PooledNoise(50.0, 3).release(many, SecureNoise(), 0)
    assert released.lengths_B.tolist() == [3, 1] * 300
    lengths = (released.rows.double() - plain.rows.double()).norm(dim=1).numpy()
    assert stats.kstest(lengths, stats.gamma(a=WIDTH, scale=1 / 50.0).cdf).pvalue > 1e-6
    assert stats.kstest(lengths, stats.gamma(a=WIDTH, scale=1 / 60.0).cdf).pvalue < 1e-6
    # The noise of a token, averaged with its segment: sqrt(3) too short.
    assert stats.kstest(lengths / math.sqrt(3), stats.gamma(a=WIDTH, scale=1 / 50.0).cdf).pvalue < 1e-12
    own = lengths.reshape(-1, 4)[:, :3]
    # Of 300 texts a correlation has a standard error of 0.06; one length for the whole text would give 1.
    assert abs(float(torch.corrcoef(torch.from_numpy(own.T.copy()))[0, 1])) < 0.4


def test_exempt_rows_have_no_noise_and_all_others_have() -> None:
    exempt = torch.zeros(VOCAB, dtype=torch.bool)
    given = batch((9,) * 50)
    exempt[given.ids_BT[0, 4]] = True
    out = HiddenNoise(50.0, exempt).release(given, DebugNoise(0), 0).rows
    same = (out == Plain().release(given, DebugNoise(0), 0).rows).all(dim=1)
    assert same.tolist() == exempt[given.ids_BT.flatten()].tolist()
    assert 0 < int(same.sum()) < len(same)


def test_substitution_gives_the_nearest_of_its_own_kind() -> None:
    exempt = torch.zeros(VOCAB, dtype=torch.bool)
    exempt[30:40] = True
    given = batch((9,) * 60)
    out = TokenSubstitution(table(), 2.5, SPECIAL, exempt).release(given, DebugNoise(0), 0).rows.long()
    before = given.ids_BT.flatten()
    kept = exempt[before] | (before == 1)
    assert torch.equal(out[kept], before[kept])
    assert not exempt[out[~kept]].any(), "an exempt token that was not there would be believed"
    assert not torch.isin(out[~kept], torch.tensor(SPECIAL)).any()
    assert 0.2 < float((out[~kept] != before[~kept]).double().mean()) < 0.999


def test_substitution_is_argmin_over_noised_embeddings() -> None:
    given, words = batch((7,) * 4), table()
    out = TokenSubstitution(words, 2.5, SPECIAL).release(given, DebugNoise(4), 9).rows.long()
    z = privatizers.dx_noise(28, WIDTH, 2.5, DebugNoise(4), step=9)
    for place, token in enumerate(given.ids_BT.flatten().tolist()):
        noised = words[token].double() + z[place]
        slow = min(range(3, VOCAB), key=lambda j: float((noised - words[j].double()).norm()))
        assert out[place] == (token if token == 1 else slow)


def test_weak_noise_keeps_tokens_and_strong_noise_does_not() -> None:
    given = batch((9,) * 60)
    changed = {}
    for eta in (1e4, 0.1):
        out = TokenSubstitution(table(), eta, SPECIAL).release(given, DebugNoise(0), 0).rows.long()
        changed[eta] = float((out != given.ids_BT.flatten()).double().mean())
    assert changed[1e4] == 0
    assert changed[0.1] > 0.8


@pytest.mark.parametrize("pooled", [True, False])
def test_no_text_moves_the_release_by_more_than_twice_the_norm(pooled: bool) -> None:
    """The sensitivity that the noise is scaled to, on huge, empty, long and broken texts."""
    mechanism = GaussianRelease(rows=1 if pooled else 12, pooled=pooled, clip_norm=1.5, std=1.0)
    texts = []
    for scale, length in ((1e30, 12), (1.0, 12), (1e-30, 3), (5.0, 1), (math.nan, 4), (math.inf, 4)):
        hidden = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(length)) * scale
        mask = torch.ones(1, length, dtype=torch.int64)
        texts.append(mechanism.clipped(Batch(mask, mask, hidden)))
    mask = torch.ones(1, 12, dtype=torch.int64)
    texts += [mechanism.clipped(Batch(mask, mask, sign * torch.full((1, 12, WIDTH), 1e6))) for sign in (1, -1)]
    assert all(t.isfinite().all() and float(t.norm()) <= 1.5 * (1 + 1e-9) for t in texts)
    widest = max(float((a - b).norm()) for a in texts for b in texts)
    assert widest <= 3.0 * (1 + 1e-9)
    assert widest > 2.99, "the bound is reached, so less noise would not do"
    assert {t.shape for t in texts} == {(1, mechanism.rows, WIDTH)}, "the length does not show"


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-5), (4.0, 1e-6), (30.0, 1e-5)])
def test_the_noise_is_calibrated_to_replace_one(epsilon: float, delta: float) -> None:
    mechanism = GaussianRelease.calibrated(1, True, 2.0, epsilon, delta)
    assert epsilon * (1 - 1e-6) < mechanism.epsilon(delta) <= epsilon * (1 + 1e-9)
    # The closed form of Balle and Wang, written out once more.
    mu = 4.0 / mechanism.std
    normal = stats.norm
    gap = normal.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal.cdf(-mu / 2 - epsilon / mu)
    assert gap == pytest.approx(delta, rel=1e-3)


def test_the_noise_that_leaves_has_the_calibrated_deviation() -> None:
    mechanism = GaussianRelease.calibrated(1, True, 1.0, 2.0, 1e-5)
    many = batch((4,) * 3000)
    left = mechanism.release(many, SecureNoise(), 0).rows.double() - mechanism.clipped(many).flatten(0, 1)
    drawn = (left / mechanism.std).flatten().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-7
    spread = 7 / math.sqrt(2 * drawn.size)  # seven standard errors
    assert float(drawn.std()) == pytest.approx(1.0, rel=spread)
    for wrong in (0.95, 1.05):
        assert float(drawn.std()) * wrong != pytest.approx(1.0, rel=spread)


def test_rows_behind_the_end_of_a_text_have_the_same_noise() -> None:
    """Else anyone could see how long it is."""
    mechanism = GaussianRelease.calibrated(12, False, 1.0, 2.0, 1e-5)
    short = batch((1,) * 500)
    left = mechanism.release(short, SecureNoise(), 0)
    assert left.lengths_B.tolist() == [12] * 500
    noise = (left.rows.double().view(500, 12, WIDTH) - mechanism.clipped(short)) / mechanism.std
    for rows in (noise[:, :1], noise[:, 1:]):
        assert float(rows.std()) == pytest.approx(1.0, rel=7 / math.sqrt(2 * rows.numel()))


@pytest.mark.parametrize("pooled", [True, False])
def test_what_leaves_is_rounded_once_after_the_noise(pooled: bool) -> None:
    """No bit of a text survives from a rounding of its own."""
    mechanism = GaussianRelease(1 if pooled else 5, pooled, 3.0, 0.7)
    given = batch((5,) * 200)
    clipped = mechanism.clipped(given)
    noise = DebugNoise(4).normal(clipped.shape, 0.7, step=0, name="rows", device=clipped.device)
    left = mechanism.release(given, DebugNoise(4), 0).rows
    assert torch.equal(left, (clipped + noise).flatten(0, 1).half())
    assert not torch.equal(left, (clipped.half() + noise.half()).flatten(0, 1)), "the twin"


def test_a_broken_bottom_is_noticed_before_anything_leaves() -> None:
    given = batch()
    assert given.hidden_BTn is not None
    given.hidden_BTn[1, 2, 0] = math.nan
    for privatizer in (Plain(), HiddenNoise(1.0), PooledNoise(1.0), PooledNoise(1.0, 2)):
        with pytest.raises(SottoError) as caught:
            privatizer.release(given, DebugNoise(0), 0)
        assert caught.value.code == "SOT802"
    given.hidden_BTn[1, 2, 0] = 0.0
    given.hidden_BTn[1, 4, 0] = math.nan  # padding may hold anything
    assert Plain().release(given, DebugNoise(0), 0).rows.isfinite().all()
    assert PooledNoise(1.0).release(given, DebugNoise(0), 0).rows.isfinite().all()
    assert PooledNoise(1.0, 2).release(given, DebugNoise(0), 0).rows.isfinite().all()


def test_the_wire_never_overflows() -> None:
    rows = HiddenNoise(1e-6).release(batch(), DebugNoise(0), 0).rows
    assert rows.dtype == torch.float16
    assert rows.isfinite().all()


SETTINGS = [
    ({"privatizer": "none"}, Plain),
    ({"privatizer": "dx_hidden", "eta": 2.0, "layer": 3}, HiddenNoise),
    ({"privatizer": "dx_pooled", "eta": 2.0, "layer": 3}, PooledNoise),
    ({"privatizer": "dx_pooled", "eta": 2.0, "layer": 3, "segment": 2}, PooledNoise),
    ({"privatizer": "dx_tokens", "eta": 2.0}, TokenSubstitution),
    ({"privatizer": "gaussian", "epsilon": 2.0, "layer": 2}, GaussianRelease),
    ({"privatizer": "gaussian_pooled", "epsilon": 2.0, "layer": 2}, GaussianRelease),
]


@pytest.mark.parametrize(("values", "kind"), SETTINGS)
def test_the_configuration_names_the_privatizer(values: dict, kind: type) -> None:
    setting = SplitSetting.model_validate({"kind": "split", **values})
    made = make(setting, table(), SPECIAL, 12)
    assert type(made) is kind
    rows = made.release(batch(), DebugNoise(0), 0).rows
    assert rows.dtype == (torch.int32 if made.sends_ids else torch.float16)
    if setting.pooled:
        assert len(rows) == len(batch().ids_BT)
    if isinstance(made, GaussianRelease):
        assert made.rows == (12 if values["privatizer"] == "gaussian" else 1)


@pytest.mark.parametrize(
    "values",
    [
        {"privatizer": "dx_hidden"},
        {"privatizer": "dx_pooled"},
        {"privatizer": "dx_pooled", "eta": 1.0, "exempt": "selected"},
        {"privatizer": "dx_pooled", "eta": 1.0, "segment": 1},
        {"privatizer": "dx_hidden", "eta": 1.0, "segment": 2},
        {"privatizer": "gaussian_pooled", "epsilon": 1.0, "segment": 2},
        {"privatizer": "none", "eta": 1.0},
        {"privatizer": "gaussian", "eta": 1.0, "epsilon": 1.0},
        {"privatizer": "gaussian"},
        {"privatizer": "dx_tokens", "eta": 1.0, "layer": 1},
        {"privatizer": "dx_hidden", "eta": 1.0, "layer": 1, "exempt": "selected"},
        {"privatizer": "gaussian", "epsilon": 1.0, "exempt": "selected"},
        {"privatizer": "dx_hidden", "eta": 1.0, "exempt": "list"},
        {"privatizer": "none", "labels": "randomised"},
        {"privatizer": "none", "label_epsilon": 1.0},
    ],
)
def test_settings_that_contradict_themselves_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=r"privatizer|label_epsilon|exempt|segment"):
        SplitSetting.model_validate({"kind": "split", **values})


# ---- the statement


def facts(**values: object) -> statement.Facts:
    setting = SplitSetting.model_validate({"kind": "split", **values})
    metric = meaning(table(), setting.eta, DebugNoise(0)) if setting.eta else None
    epsilon = 2.0004 if setting.epsilon else None
    label = setting.label_epsilon
    exempt = ("good", "bad") if setting.exempt != "none" else ()
    cost = 1.0 if setting.exempt == "selected" else None
    return statement.Facts(setting, 10, 99, "ab" * 32, metric, epsilon, label, exempt, cost, 12)


@pytest.mark.parametrize(("values", "kind"), SETTINGS)
def test_only_differential_privacy_is_stated_as_epsilon(values: dict, kind: type) -> None:
    text = statement.text(facts(**values))
    if kind is GaussianRelease:
        assert "epsilon 2.001, delta 1e-05" in " ".join(text.split())
    else:
        assert "delta" not in text
        assert "epsilon" not in text.replace("eta is no epsilon", "")
    assert text.startswith("NOT PRIVATE" if kind is Plain else "SPLIT STATEMENT")
    assert ("eta 2" in text) == (values.get("eta") is not None)
    assert max(map(len, text.splitlines())) <= 102


@pytest.mark.parametrize(("values", "kind"), SETTINGS)
@pytest.mark.parametrize("labels", ["sent", "randomised", "kept"])
def test_a_plan_says_what_the_statement_will_say(values: dict, kind: type, labels: str) -> None:
    if labels != "sent":
        values = {**values, "labels": labels, "label_epsilon": 1.5}
    later = facts(**values)
    if later.epsilon is not None:
        later = dataclasses.replace(later, epsilon=2.0)
    text = " ".join(statement.text(later).split())
    told = dict(statement.planned(later.setting, 12))
    for title, words in told.items():
        for sentence in re.split(r"(?<=\.) ", words):
            if not sentence.startswith(("Each text leaves once", "Two ", "'sotto split meaning'", "Some words leave")):
                assert sentence.rstrip(".") in text, title
    assert told["what leaves"].split(": ")[1].split(". ")[0] in text
    assert ("'sotto split meaning'" in told["text"]) == (later.meaning is not None)
    assert ("words" in told) == (later.setting.exempt != "none")


def test_the_statement_names_exempt_words_and_what_labels_cost() -> None:
    text = " ".join(statement.text(facts(privatizer="dx_tokens", eta=2.0, exempt="selected")).split())
    assert "good, bad" in text
    assert "epsilon 1.000, delta 1e-05, for the choice alone" in text
    values = {"privatizer": "gaussian", "epsilon": 2.0, "labels": "randomised", "label_epsilon": 1.0}
    text = " ".join(statement.text(facts(**values)).split())
    assert "randomised response: epsilon 1.000 for one label" in text
    assert "together: epsilon 3.001" in text
    assert "every label as it is" in statement.text(facts(privatizer="none"))
    words = {"privatizer": "dx_tokens", "eta": 2.0, "exempt": "selected", "label_epsilon": 1.5}
    text = " ".join(statement.text(facts(**words, labels="randomised")).split())
    assert "The choice of words uses the labels too: together epsilon 2.500, delta 1e-05." in text
    text = " ".join(statement.text(facts(**words, labels="kept")).split())
    assert "together epsilon 2.500, delta 2e-05." in text


def test_above_the_embeddings_the_statement_counts_the_rows_around_a_token() -> None:
    told = "changes the rows of the tokens around it"
    assert told in " ".join(statement.text(facts(privatizer="dx_hidden", eta=2.0, layer=1)).split())
    segments = {"privatizer": "dx_pooled", "segment": 3}
    assert told in " ".join(statement.text(facts(**segments, eta=2.0, layer=1)).split())
    for values in ({"privatizer": "dx_hidden"}, {"privatizer": "dx_pooled", "layer": 1}, segments):
        assert told not in " ".join(statement.text(facts(**values, eta=2.0)).split())


def test_the_statement_says_what_a_segment_is_and_what_eta_means_for_one() -> None:
    values = {"privatizer": "dx_pooled", "segment": 3, "eta": 2.0}
    text = " ".join(statement.text(facts(**values)).split())
    assert "the mean of each segment of 3 tokens by itself (the last of a text has up to 5)" in text
    assert "After the noise a segment was still the nearest to its own" in text
    assert "moves the mean by at most 1/3 of their distance" in text
    assert "Over a text these exponents add up" in text
    assert "Still open: the number of segments of each text," in text
    above = " ".join(statement.text(facts(**values, layer=1)).split())
    assert "1/3" not in above, "there a token moves the means of other segments as well"
    assert "segment" not in statement.text(facts(privatizer="dx_pooled", eta=2.0, layer=1))


def test_survival_in_the_statement_is_what_substitution_does() -> None:
    words = table()
    found = meaning(words, 2.5, DebugNoise(0), probes=VOCAB).survival
    ids = torch.arange(VOCAB).repeat(200)
    z = privatizers.dx_noise(len(ids), WIDTH, 2.5, DebugNoise(5))
    survived = float((nearest(words[ids].double() + z, words) == ids).double().mean())
    assert found == pytest.approx(survived, abs=0.2)
    assert f"{found:.1%}" in statement.text(facts(privatizer="dx_tokens", eta=2.5))

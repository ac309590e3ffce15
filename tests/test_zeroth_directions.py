"""Directions are public, the same however they are cut, and have mean zero and identity covariance."""

from __future__ import annotations

import hashlib
import math
import random
from statistics import NormalDist

import numpy as np
import pytest
import torch

from sotto.errors import SottoError
from sotto.zeroth_order import counter, directions, entries, laws
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.law import LAWS, Law

KEY = "0123456789abcdef0123456789abcdef"
SHAPES = {"matrix": torch.Size((37, 24)), "vector": torch.Size((131,)), "scalar": torch.Size(())}
ALL = [Law(kind, 0) for kind in LAWS] + [Law("rademacher", 3), Law("gaussian", 2)]


def make(law: Law, count: int = 8, shapes: dict[str, torch.Size] | None = None, **others: object) -> Directions:
    return Directions(KEY, shapes or SHAPES, count, law, **others)  # type: ignore[arg-type]


# ---- the counter


def philox(key: int, c: list[int]) -> list[int]:
    """Salmon et al. 2011, section 3.1.3, one block at a time."""
    low, k = 0xFFFFFFFF, [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & low, a >> 32 ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


ONES = 0xFFFFFFFF
KNOWN = [  # the vectors that the authors of Philox publish: counter, key, block
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("at", "key_parts", "block"), KNOWN)
def test_known_answers(at, key_parts, block):
    key = key_parts[0] + (key_parts[1] << 32)
    assert philox(key, list(at)) == list(block)
    first = 4 * (at[0] + (at[1] << 32))
    assert counter.words(key, at[3], at[2], first, first + 4).tolist() == list(block)


@pytest.mark.parametrize("start", [0, 1, 6, 4 * 2**32 - 3, 2**40 + 2])
def test_words_are_the_same_in_parts_and_on_a_device(start):
    key = counter.stream_key(KEY, "w", "entry")
    whole = counter.words(key, 7, 3, start, start + 50)
    for i, j in ((0, 1), (3, 50), (17, 18), (49, 50), (20, 20)):
        assert counter.words(key, 7, 3, start + i, start + j).tolist() == whole[i:j].tolist()
    first = start // 4
    found = counter.blocks(key, 7, 3, torch.arange(first, first + 14)).flatten()
    assert found[start - 4 * first :][:50].tolist() == whole.tolist()
    assert found[:4].tolist() == philox(key, [first & ONES, first >> 32, 3, 7])


def test_streams_are_told_apart():
    assert counter.stream_key("ab", "c") != counter.stream_key("a", "bc")
    assert counter.stream_key("a", "b", "") != counter.stream_key("a", "b")
    seen = {
        counter.words(counter.stream_key(key, name, role), step, k, 0, 4).tobytes()
        for key in ("a", "b")
        for name in ("v", "w")
        for role in ("left", "right")
        for step in range(3)
        for k in range(3)
    }
    assert len(seen) == 72


# ---- the entries, against their definition


def walsh_row(step: int, k: int, count: int, words: int) -> tuple[int, int, int]:
    """Cycle, row and sign of an orthogonal direction."""
    group = 2 ** math.ceil(math.log2(count))
    rows = max(group, 2 ** math.ceil(math.log2(32 * words)))
    cycle, place = step // (rows // group), step % (rows // group)
    a, b, *_ = philox(counter.stream_key(KEY, "", "groups"), [0, 0, 0, cycle])
    flips = philox(counter.stream_key(KEY, "", "flips"), [0, 0, 0, step])
    flip = flips[k // 32] >> k % 32 & 1
    return cycle, ((2 * a + 1) * place + b) % (rows // group) * group + k, 1 - 2 * flip


FIRST_COLUMN = {"matrix": 0, "scalar": 28 * 32, "vector": 29 * 32}  # by name, each from a whole word on: 34 words


def entry(law: str, name: str, step: int, k: int, e: int) -> float:
    """One entry of a direction of 50, made alone and by the book. `sphere` before it is stretched."""
    key = counter.stream_key(KEY, name, "entry")
    cycle, row, sign = walsh_row(step, k, 50, 34) if law == "orthogonal" else (step, 0, 1)
    word = e // 32
    drawn = philox(key, [word // 4 & ONES, word // 4 >> 32, 0 if law == "orthogonal" else k, cycle])[word % 4]
    bit = 1 - 2 * (drawn >> e % 32 & 1)
    if law in ("gaussian", "sphere"):
        run = e // 16384
        places = counter.stream_key(KEY, name, "entry places")
        place = philox(places, [run // 4, 0, k, step])[run % 4] % 65536
        return bit * int(laws.sizes()[(place + e % 16384) % 65536]) / 2**20
    return sign * bit * (-1) ** (row & e + FIRST_COLUMN[name]).bit_count()


@pytest.mark.parametrize("law", ["rademacher", "gaussian", "orthogonal"])
def test_entries_by_definition(law):
    made = make(Law(law), count=50)
    for step in (9, 33):
        for name in SHAPES:
            for k in (0, 5, 47):
                found = made.tensor(name, step, k).flatten()
                expected = [entry(law, name, step, k, e) for e in range(len(found))]
                assert found.tolist() == expected


def test_golden_values():
    """A run is replayed from its key, also by later versions: these numbers may never change."""
    assert counter.stream_key(KEY, "vector", "entry") == 0x498FC7791A0E1586
    assert hashlib.sha256(laws.sizes().astype("<i4").tobytes()).hexdigest() == (
        "e55ebff0df0cee5e8f490b3eac82240199d705e98b01a112f2beacc906b87599"
    )
    firsts = {law: make(law).tensor("matrix", 3, 2).flatten()[:4].tolist() for law in ALL}
    assert firsts == {
        Law(kind="rademacher", rank=0): [1.0, 1.0, -1.0, 1.0],
        Law(kind="gaussian", rank=0): [
            0.9869661331176758,
            2.0970754623413086,
            -0.827885627746582,
            1.8147926330566406,
        ],
        Law(kind="sphere", rank=0): [
            0.9998887181282043,
            2.12453293800354,
            -0.8387253284454346,
            1.8385541439056396,
        ],
        Law(kind="orthogonal", rank=0): [-1.0, -1.0, -1.0, 1.0],
        Law(kind="rademacher", rank=3): [
            -0.5773502588272095,
            -1.7320507764816284,
            0.5773502588272095,
            -0.5773502588272095,
        ],
        Law(kind="gaussian", rank=2): [
            0.4514371454715729,
            -0.4457181692123413,
            -0.646109402179718,
            0.18913434445858002,
        ],
    }


def test_the_sizes_are_half_normal_and_in_no_order():
    normal, table = NormalDist(), laws.sizes() / 2**20
    ranked = np.sort(table)
    for i in (0, 1, 999, 32767, 50000, 65535):
        assert ranked[i] == pytest.approx(normal.inv_cdf(0.5 + (i + 0.5) / 131072), abs=2e-4)
    assert np.square(table).mean() == pytest.approx(1, abs=1e-8)
    for t in (0.1, 0.5, 1.0, 2.0, 3.0):  # the characteristic function of a size with a random sign
        assert np.cos(t * table).mean() == pytest.approx(math.exp(-t * t / 2), abs=5e-6)
    # Two entries of a run stand a fixed way apart: their squares are as good as independent, whatever the way is.
    ways = [float((np.square(table) * np.square(np.roll(table, way))).mean()) for way in range(1, 16384, 3)]
    assert max(abs(mean - 1) for mean in ways) < 0.04
    assert abs(float(np.mean(ways)) - 1) < 1e-3
    assert np.square(ranked) @ np.square(np.roll(ranked, 1)) / 65536 > 2.9  # sorted they would not be


def test_runs_have_places_of_their_own():
    """Of sixteen runs none has the sizes of another, and none those of another step, direction or tensor."""
    shapes = {"a": torch.Size((8, 16384)), "b": torch.Size((8 * 16384,))}
    made = make(Law("gaussian"), shapes=shapes)
    firsts = {
        (name, step, k): made.tensor(name, step, k).abs().view(8, 16384)[:, 0].tolist()
        for name in shapes for step in (0, 1) for k in (0, 1)
    }  # fmt: skip
    assert len({size for row in firsts.values() for size in row}) > 60  # of 64, drawn from 65,536
    whole = made.tensor("b", 0, 0)
    twelve = [float(made.slice("b", 0, 0, e, e + 1)) for e in range(16380, 16392)]
    assert twelve == whole[16380:16392].tolist()


def test_the_length_of_a_sphere_is_counted_from_its_runs():
    shapes = {"a": torch.Size((3, 9000)), "b": torch.Size((16384,)), "c": torch.Size((5,))}
    made = make(Law("sphere"), shapes=shapes)
    entries_d = torch.cat([make(Law("gaussian"), shapes=shapes).tensor(n, 4, 2).flatten() for n in shapes]).double()
    assert made.stretch(4, 2) == pytest.approx(math.sqrt(43389 / float(entries_d.square().sum())), rel=1e-12)
    masks = {"a": torch.rand(3, 9000, generator=torch.Generator().manual_seed(0)) < 0.3}
    masked = make(Law("sphere"), shapes=shapes, masks=masks)
    kept_d = torch.cat([masks["a"].flatten(), torch.ones(16389, dtype=torch.bool)])
    squares = float(entries_d[kept_d].square().sum())
    assert masked.stretch(4, 2) == pytest.approx(math.sqrt(int(kept_d.sum()) / squares), rel=1e-12)
    assert masked.stretch(4, 2) != made.stretch(4, 2)


# ---- parts agree with the whole


@pytest.mark.parametrize("law", ALL, ids=str)
def test_slices_and_rows_equal_the_whole(law, monkeypatch):
    made = make(law, count=40)
    whole = {name: made.tensor(name, 3, 37) for name in SHAPES}
    monkeypatch.setattr(entries, "CHUNK", 96)
    again = make(law, count=40)
    generator = random.Random(0)
    for name, shape in SHAPES.items():
        flat = whole[name].flatten()
        assert whole[name].shape == shape
        for _ in range(25):
            start = generator.randrange(len(flat))
            stop = generator.randrange(start, len(flat) + 1)
            assert torch.equal(again.slice(name, 3, 37, start, stop), flat[start:stop])
    rows_n = torch.tensor([0, 36, 5, 5, 20])
    assert torch.equal(again.rows("matrix", 3, 37, rows_n), whole["matrix"][rows_n])


@pytest.mark.parametrize("law", ALL, ids=str)
def test_pieces_equal_slices(law, monkeypatch):
    made = make(law, count=8)
    whole = {name: made.tensor(name, 3, 5).flatten() for name in SHAPES}
    monkeypatch.setattr(entries, "CHUNK", 160)
    monkeypatch.setattr(entries, "PIECE", 64)
    again = make(law, count=8)
    for name, flat in whole.items():
        for start, stop in ((0, len(flat)), (len(flat) // 3, len(flat) - 1), (len(flat) // 2, len(flat) // 2)):
            parts = [(i, j, u.clone()) for i, j, u in again.pieces(name, 3, 5, start, stop, torch.device("cpu"))]
            assert [start, *(j for _, j, _ in parts)] == [*(i for i, _, _ in parts), stop]
            assert torch.equal(torch.cat([u for _, _, u in parts] or [flat[:0]]), flat[start:stop])


@pytest.mark.parametrize("law", ALL, ids=str)
def test_nothing_else_has_an_influence(law):
    """Not the order, not the other tensors (but for the sphere's length and the columns of orthogonal directions), not
    torch's or numpy's random state."""
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    one, two = make(law), make(law)
    expected = one.tensor("vector", 1, 1)
    two.tensor("matrix", 5, 3)
    torch.manual_seed(torch.initial_seed() + 1)
    assert torch.equal(two.tensor("vector", 1, 1), expected)
    if law.kind not in ("sphere", "orthogonal"):
        assert torch.equal(make(law, shapes={"vector": SHAPES["vector"]}).tensor("vector", 1, 1), expected)
    torch.set_rng_state(states[0])
    make(law).tensor("vector", 1, 1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    for other in (one.tensor("vector", 2, 1), one.tensor("vector", 1, 2)):
        assert not torch.equal(other, expected)
    assert not torch.equal(Directions(KEY[::-1], SHAPES, 8, law).tensor("vector", 1, 1), expected)


def test_low_rank_is_the_product_of_its_factors():
    made = make(Law("gaussian", 2))
    u_mr, v_cr = made.factors("matrix", 4, 1)
    assert u_mr.shape == (37, 2)
    assert v_cr.shape == (24, 2)
    matrix = made.tensor("matrix", 4, 1)
    torch.testing.assert_close(matrix, u_mr @ v_cr.T)
    assert torch.linalg.matrix_rank(matrix) == 2


# ---- laws


def all_of(made: Directions, step: int, k: int) -> torch.Tensor:
    return torch.cat([made.tensor(name, step, k).flatten() for name in made.shapes]).double()


def assert_moments(x_nd: torch.Tensor) -> None:
    """Mean 0 and covariance identity, within seven standard errors of every entry (fourth moments are below 9)."""
    draws = len(x_nd)
    assert float(x_nd.mean(0).abs().max()) < 7 / math.sqrt(draws)
    covariance = x_nd.T @ x_nd / draws
    assert float((covariance - torch.eye(len(covariance))).abs().max()) < 7 * math.sqrt(8 / draws)
    assert float(covariance.diagonal().mean()) == pytest.approx(1, abs=7 * math.sqrt(8 / draws / len(covariance)))


SMALL = {"m": torch.Size((6, 4)), "v": torch.Size((8,))}


@pytest.mark.parametrize("law", ALL, ids=str)
def test_mean_zero_and_covariance_identity(law):
    made = make(law, shapes=SMALL)
    x_nd = torch.stack([all_of(made, step, 3) for step in range(3000)])
    assert_moments(x_nd)
    for mutant in (1.1 * x_nd, x_nd + 0.2, x_nd + 0.3 * x_nd.roll(1, dims=1)):
        with pytest.raises(AssertionError):
            assert_moments(mutant)


def test_the_directions_of_one_step_are_orthogonal():
    shapes = {"m": torch.Size((16, 8)), "v": torch.Size((64,))}
    made = make(Law("orthogonal"), count=50, shapes=shapes)
    x_Kd = torch.stack([all_of(made, 2, k) for k in range(50)])
    assert torch.equal(x_Kd @ x_Kd.T, made.size * torch.eye(50, dtype=torch.float64))
    independent = make(Law("rademacher"), count=50, shapes=shapes)
    y_Kd = torch.stack([all_of(independent, 2, k) for k in range(50)])
    assert not torch.equal(y_Kd @ y_Kd.T, made.size * torch.eye(50, dtype=torch.float64))


def gram(made: Directions, steps: int) -> torch.Tensor:
    """Products of all directions of the first steps with one another, over d."""
    x_nd = torch.stack([all_of(made, step, k) for step in range(steps) for k in range(made.count)])
    return x_nd @ x_nd.T / made.size


def test_the_directions_of_a_cycle_are_orthogonal_and_see_every_dimension():
    shapes = {"m": torch.Size((16, 8)), "v": torch.Size((128,))}
    made = make(Law("orthogonal"), count=16, shapes=shapes)
    assert torch.equal(gram(made, 16), torch.eye(256, dtype=torch.float64))
    assert not torch.equal(gram(made, 17), torch.eye(272, dtype=torch.float64))  # a new cycle looks again
    again = torch.stack([all_of(made, 16 + step, k) for step in range(16) for k in range(16)])
    assert torch.equal(again @ again.T / 256, torch.eye(256, dtype=torch.float64))
    assert not torch.equal(again[0], all_of(made, 0, 0))


def test_no_dimension_is_lost_with_the_mean_of_a_step():
    """Centred numbers say nothing along the mean of a step's directions: not along the same weights each time."""
    shapes = {"v": torch.Size((256,))}
    made = make(Law("orthogonal"), count=8, shapes=shapes)
    means = torch.stack([torch.stack([all_of(made, step, k) for k in range(8)]).sum(0) for step in range(32)])
    assert bool((means.abs().sum(0) > 0).all())
    assert float(means.square().mean(0).max()) < 2 * 8


@pytest.mark.parametrize("kind", LAWS)
def test_directions_over_classes_add_up_to_zero_and_cover_all_that_does(kind):
    shapes = {"w": torch.Size((3, 8)), "b": torch.Size((3,)), "other": torch.Size((5,))}
    made = make(Law(kind), shapes=shapes, classes=("w", "b"))
    assert made.size == 16 + 2 + 5
    x_nd = torch.stack([all_of(made, step, 3) for step in range(3000)])
    zero_sum = torch.eye(3, dtype=torch.float64) - 1 / 3
    expected = torch.block_diag(
        torch.kron(zero_sum, torch.eye(8, dtype=torch.float64)), zero_sum, torch.eye(5, dtype=torch.float64)
    )
    covariance = x_nd.T @ x_nd / 3000
    assert float((covariance - expected).abs().max()) < 7 * math.sqrt(8 / 3000)
    assert float((covariance - torch.eye(32, dtype=torch.float64)).abs().max()) > 0.3
    w_ncx = x_nd[:, :24].view(-1, 3, 8)
    assert float(w_ncx.sum(1).abs().max()) < 1e-5
    for start, stop in ((0, 24), (5, 19), (23, 24)):
        assert torch.equal(made.slice("w", 1, 2, start, stop), made.tensor("w", 1, 2).flatten()[start:stop])
    rows_n = torch.tensor([2, 0, 2])
    assert torch.equal(made.rows("w", 1, 2, rows_n), made.tensor("w", 1, 2)[rows_n])
    assert made.spec() != make(Law(kind), shapes=shapes).spec()


def test_two_classes_keep_orthogonality():
    shapes = {"w": torch.Size((2, 64))}
    made = make(Law("orthogonal"), count=16, shapes=shapes, classes=("w",))
    torch.testing.assert_close(gram(made, 4), torch.eye(64, dtype=torch.float64), atol=1e-6, rtol=0)


def test_sizes_that_do_not_fit_cost_little_orthogonality():
    made = make(Law("orthogonal"), count=16)
    x_Kd = torch.stack([all_of(made, 0, k) for k in range(16)])
    rest = x_Kd @ x_Kd.T - made.size * torch.eye(16, dtype=torch.float64)
    assert 0 < float(rest.abs().max()) <= 16 * len(SHAPES)


def test_the_sphere_has_its_length():
    made = make(Law("sphere"))
    mask = torch.arange(131) % 3 == 0
    masked = make(Law("sphere"), masks={"vector": mask})
    for k in range(8):
        assert float(all_of(made, 1, k).square().sum()) == pytest.approx(made.size, rel=1e-6)
        assert float(all_of(masked, 1, k).square().sum()) == pytest.approx(masked.size, rel=1e-6)
    assert masked.size == made.size - int((~mask).sum())


@pytest.mark.parametrize("kind", LAWS)
def test_a_mask_drops_entries_and_changes_no_other(kind):
    mask = torch.arange(37 * 24).view(37, 24) % 5 == 0
    made, plain = make(Law(kind), masks={"matrix": mask}), make(Law(kind))
    expected = (
        plain.tensor("matrix", 0, 1) * mask * (made.stretch(0, 1) / plain.stretch(0, 1) if kind == "sphere" else 1)
    )
    torch.testing.assert_close(made.tensor("matrix", 0, 1), expected)
    assert torch.equal(made.rows("matrix", 0, 1, torch.tensor([4, 9])), made.tensor("matrix", 0, 1)[[4, 9]])
    assert made.spec()["masks"] != plain.spec()["masks"]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: make(Law("uniform")),
        lambda: make(Law("gaussian", -1)),
        lambda: make(Law("sphere", 2)),
        lambda: make(Law("orthogonal", 2)),
        lambda: make(Law(), count=0),
        lambda: make(Law(), count=True),
        lambda: make(Law(), count=1.5),  # type: ignore[arg-type]
        lambda: Directions(KEY, {}, 1),
        lambda: make(Law(), count=1, centred=True),
        lambda: make(Law(), classes=["scalar"]),
        lambda: make(Law(), classes=["other"]),
        lambda: make(Law(), classes=["matrix"], masks={"matrix": torch.ones(37, 24, dtype=torch.bool)}),
        lambda: make(Law("gaussian", 2), classes=["matrix"]),
        lambda: make(Law(), masks={"matrix": torch.ones(3, dtype=torch.bool)}),
        lambda: make(Law(), masks={"other": torch.ones(3, dtype=torch.bool)}),
        lambda: make(Law(), masks={"vector": torch.ones(131)}),
        lambda: make(Law("gaussian", 2), masks={"matrix": torch.ones(37, 24, dtype=torch.bool)}),
    ],
)
def test_bad_arguments(bad):
    with pytest.raises(SottoError) as caught:
        bad()
    assert caught.value.code == "SOT650"
    assert caught.value.fix


def test_logs_of_signs_do_not_ask_for_the_runs_of_sizes():
    assert {law.kind for law in ALL if "run" in make(law).spec()} == {"gaussian", "sphere"}


def test_another_default_type_changes_nothing():
    classes = {"w": torch.Size((3, 50))}
    made = [(make(law), "matrix") for law in ALL] + [(make(Law("sphere"), shapes=classes, classes=["w"]), "w")]
    expected = [one.tensor(name, 2, 1) for one, name in made]
    torch.set_default_dtype(torch.float64)
    try:
        again = [(make(law), "matrix") for law in ALL] + [(make(Law("sphere"), shapes=classes, classes=["w"]), "w")]
        for (one, name), x in zip(again, expected, strict=True):
            assert torch.equal(one.tensor(name, 2, 1), x)
            pieces = [part.clone() for _, _, part in one.pieces(name, 2, 1, 0, x.numel(), x.device)]
            assert torch.equal(torch.cat(pieces), x.flatten())
    finally:
        torch.set_default_dtype(torch.float32)


def test_keys_are_fresh():
    assert len({directions.new_key() for _ in range(100)}) == 100

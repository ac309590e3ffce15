"""Moved weights on the CPU: the sum that three operations would give, in whatever parts."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sotto.zeroth_order import compiled, laws, processor
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.law import LAWS, Law
from sotto.zeroth_order.small import LARGEST, Room, groups

KEY, SIZE, FACTOR = "0123456789abcdef0123456789abcdef", 9 * 1000 + 7, 0.3
SHAPES = {"before": torch.Size((131,)), "w": torch.Size((SIZE,))}


@pytest.fixture(params=["numpy", "compiled"], autouse=True)
def way(request, monkeypatch):
    """Each of the two ways for tensors of any size."""
    if request.param == "compiled" and compiled.loop(True) is None:
        pytest.skip("no C compiler that works")
    monkeypatch.setattr(compiled, "LEAST", 1 if request.param == "compiled" else 1 << 60)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(processor, "PIECE", 256)
    monkeypatch.setattr(processor, "WORDS", 4096)


def direction(kind: str, **others: Any) -> Directions:
    return Directions(KEY, SHAPES, 3, Law(kind), **others)


def source() -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1))


def moved(made: Directions, first: int = 0, stop: int = SIZE, target: torch.Tensor | None = None) -> torch.Tensor:
    weights_e = source()[first:stop]
    target_e = torch.full_like(weights_e, torch.nan) if target is None else target
    assert processor.add(made.stream("w", 5, 1), FACTOR, weights_e, first, target_e)
    return target_e


@pytest.mark.parametrize("kind", LAWS)
def test_entries_products_and_sums_are_each_rounded(kind, small_parts):
    made = direction(kind)
    product_e = made.slice("w", 5, 1, 0, SIZE).mul(FACTOR)
    expected_e = source().add(product_e)
    assert torch.equal(moved(made), expected_e)
    for first, stop in ((0, 1), (1, 2), (31, 33), (255, 258), (1000, 9001), (4096, SIZE), (SIZE - 1, SIZE)):
        assert torch.equal(moved(made, first, stop), expected_e[first:stop])


def test_the_target_may_be_the_source(small_parts):
    made, total_e = direction("gaussian"), source()
    assert processor.add(made.stream("w", 5, 1), FACTOR, total_e, 0, total_e)
    assert torch.equal(total_e, moved(made))


def test_sums_begin_at_a_zero_without_a_sign():
    """As a GPU's do; a product alone would be -0 in half of the places."""
    zero_e = torch.zeros(SIZE)
    assert processor.add(direction("rademacher").stream("w", 5, 1), 0.0, zero_e, 0, zero_e)
    assert not zero_e.signbit().any()


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_the_sign_of_a_zero_does_not_follow_what_was_asked_before(kind):
    """A rate of 0 at the end of a schedule, times numbers of either sign, on weights that are -0."""
    found = []
    for factors in ((0.0, -0.0), (-0.0, 0.0)):
        laws.sign_table.cache_clear()
        laws.stretched.cache_clear()
        for factor in factors:
            weights_e = torch.full((SIZE,), -0.0)
            direction(kind).add("w", 5, 1, factor, weights_e, 0, weights_e, exact=True)
            found.append(weights_e.signbit())
    assert all(torch.equal(signs, found[0]) for signs in found[1:])


def test_nothing_is_done_where_another_way_is_right():
    stream, x = direction("rademacher").stream("w", 5, 1), torch.zeros(SIZE)
    assert not processor.add(None, 1.0, x, 0, x)
    for kind in (torch.float64, torch.bfloat16):
        assert not processor.add(stream, 1.0, x.to(kind), 0, x.to(kind))
        assert not processor.add(stream, 1.0, x, 0, x.to(kind))
    on_gpu = torch.zeros(3, device="meta")
    assert not processor.add(stream, 1.0, on_gpu, 0, on_gpu)
    assert torch.equal(x, torch.zeros(SIZE))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_sums_that_are_too_large_are_infinite_and_no_warning(kind, small_parts):
    huge_e = torch.full((SIZE,), 3e38)
    assert processor.add(direction(kind).stream("w", 5, 1), 3e38, huge_e, 0, huge_e)
    assert huge_e.isinf().any()
    assert processor.add(direction(kind).stream("w", 5, 2), float("inf"), huge_e, 0, huge_e)
    assert huge_e.isnan().any()


def test_threads_that_move_weights_at_once_do_not_disturb_one_another(small_parts):
    made, asked = direction("gaussian"), [("w", first) for first in (0, 500, 4000)] * 20
    expected = [moved(made, first) for _, first in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: moved(made, part[1]), asked))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "state",
    [torch.inference_mode(), torch.device("meta"), FakeTensorMode()],
    ids=["inference", "meta", "fake"],
)
def test_what_torch_was_doing_does_not_stay(state):
    """Rooms and constants that were made in one of its modes would be of that mode for good."""
    processor._rooms.__dict__.clear()
    weights, shapes = {"w": source()}, {"w": torch.Size((SIZE,)), "t": torch.Size((9, 5))}

    def all_of_it(made: Directions) -> list[torch.Tensor]:
        whole_e = torch.empty(SIZE)
        made.add("w", 5, 1, FACTOR, weights["w"], 0, whole_e)
        (together_e,) = Room(groups(weights, made)).moved(5, [(1, FACTOR)])[0].values()
        return [whole_e, together_e, made.rows("t", 5, 1, torch.tensor([8, 0]))]

    with contextlib.suppress(Exception), state:
        all_of_it(Directions("f" * 32, shapes, 3, Law("gaussian")))
    found = all_of_it(Directions(KEY, shapes, 3, Law("gaussian")))
    entries_e = Directions(KEY, shapes, 3, Law("gaussian")).slice("w", 5, 1, 0, SIZE)
    assert torch.equal(found[0], source() + entries_e * FACTOR)
    assert torch.equal(found[1], found[0])
    assert type(found[2]) is torch.Tensor
    assert found[2].abs().sum() > 0


def test_an_empty_tensor_beside_large_ones():
    shapes = {"w": torch.Size((LARGEST + 1,)), "e": torch.Size((0,))}
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for kind in LAWS:
        assert Room(groups(weights, Directions(KEY, shapes, 2, Law(kind)))).moved(0, [(0, 1.0)])[0] == {}


SMALL = {"a": 5, "b": 128, "c": 129, "d": laws.RUN, "e": laws.RUN + 1, "f": LARGEST, "g": 1, "h": 3 * laws.RUN - 1}


@pytest.mark.parametrize("kind", LAWS)
def test_many_small_tensors_move_at_once_as_each_would_alone(kind, monkeypatch):
    monkeypatch.setattr("sotto.zeroth_order.small.GROUP", 5 * laws.RUN)
    monkeypatch.setattr("sotto.zeroth_order.processor.FEW", 3 * laws.RUN)
    shapes = {name: torch.Size((n,)) for name, n in SMALL.items()}
    made = Directions(KEY, shapes, 3, Law(kind))
    weights = {name: torch.randn(n) for name, n in SMALL.items()}
    small = Room(groups(weights, made))  # in three groups: one holds more than it should, as its one tensor does
    for step, k, factor in ((0, 0, FACTOR), (4, 2, -FACTOR)):
        (found,) = small.moved(step, [(k, factor)])
        assert len(found) == len(weights)
        for name, w in weights.items():
            alone_e = torch.empty_like(w)
            made.add(name, step, k, factor, w, 0, alone_e)
            assert torch.equal(found[id(w)], alone_e), name


def test_what_is_large_masked_low_rank_or_in_half_precision_moves_alone():
    shapes = {"large": torch.Size((LARGEST + 1,)), "masked": torch.Size((9,)), "half": torch.Size((9,)),
              "w": torch.Size((3, 3))}  # fmt: skip
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights["half"] = weights["half"].bfloat16()
    masks = {"masked": torch.ones(9, dtype=torch.bool)}
    found = Room(groups(weights, Directions(KEY, shapes, 2, Law("gaussian"), masks))).moved(0, [(0, 1.0)])[0]
    assert set(found) == {id(weights["w"])}
    low_rank = groups(weights, Directions(KEY, shapes, 2, Law("gaussian", rank=1)))
    assert not Room(low_rank).moved(0, [(0, 1.0)])[0].keys() & set(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("case", ["plain", "masked", "low rank", "sphere"])
def test_directions_are_added_whatever_they_are(case, exact, dtype):
    shape = torch.Size((60, 40))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5
    law = Law("rademacher", 2) if case == "low rank" else Law("sphere" if case == "sphere" else "gaussian")
    made = Directions(KEY, {"w": shape}, 2, law, {"w": mask} if case == "masked" else None)
    weights_e = torch.randn(2400, generator=torch.Generator().manual_seed(1)).to(dtype)
    target_e = torch.empty_like(weights_e)[:2000]
    made.add("w", 1, 1, FACTOR, weights_e[400:], 400, target_e, exact)
    expected_e = weights_e.double() + FACTOR * made.tensor("w", 1, 1).flatten().double()
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-7, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(target_e.double(), expected_e[400:], rtol=tolerance, atol=tolerance)
    assert target_e.dtype == dtype

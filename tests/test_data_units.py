import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sotto.data.units import Units, clean_units, ranges

NAMES = st.lists(st.sampled_from(["ann", "bob", "cy", "ärzte"]), max_size=40)


def members(units: Units, u: int) -> list[int]:
    return units.members[units.offsets[u] : units.offsets[u + 1]].tolist()


def test_records_are_units_of_one():
    units, dropped = Units.build(None, 4, 1, 0)
    assert len(units) == 4
    assert dropped == 0
    assert units.sizes.tolist() == [1, 1, 1, 1]


def test_one_unit_per_name_in_order_of_first_appearance():
    units, dropped = Units.build(["b", "a", "b", "c"], 4, 5, 0)
    assert [members(units, u) for u in range(3)] == [[0, 2], [1], [3]]
    assert dropped == 0


@given(NAMES, st.integers(1, 6), st.integers(0, 5))
def test_the_bound_holds_and_nothing_is_lost_below_it(names, most, seed):
    units, dropped = Units.build(names, len(names), most, seed)
    assert len(units) == len(set(names))
    assert len(set(units.members.tolist())) == len(units.members) == len(names) - dropped
    for u in range(len(units)):
        mine = members(units, u)
        name = names[mine[0]]
        assert {names[e] for e in mine} == {name}
        assert len(mine) == min(most, names.count(name))
        assert mine == sorted(mine)


@given(NAMES.filter(bool), st.integers(1, 4), st.integers(0, 5))
@settings(deadline=None)
def test_another_unit_changes_nothing_for_this_one(names, most, seed):
    def kept(those: list[str], name: str) -> list[int]:
        """Which of the unit's own examples are kept, counted within the unit."""
        units, _ = Units.build(those, len(those), most, seed)
        own = [e for e, n in enumerate(those) if n == name]
        return [own.index(e) for u in range(len(units)) for e in members(units, u) if those[e] == name]

    for name in set(names):
        alone = [n for n in names if n == name]
        assert kept(names, name) == kept(alone, name)
        assert kept(["stranger"] * 7 + names, name) == kept(alone, name)


def test_rows_as_units_do_not_depend_on_the_rows_before_them():
    def kept(rows: list[int]) -> list[int]:
        units, _ = Units.build(rows, len(rows), 1, 0)
        return [members(units, u)[0] - rows.index(rows[members(units, u)[0]]) for u in range(len(units))]

    # Row 0 is removed: rows 1 and 2 move up, and the same pieces of them are kept.
    assert kept([0] * 3 + [1] * 9 + [2] * 7)[1:] == kept([0] * 9 + [1] * 7)


def test_the_choice_is_random_and_follows_the_seed():
    names = ["ann"] * 20
    chosen = [tuple(Units.build(names, 20, 5, seed)[0].members) for seed in range(200)]
    assert chosen[0] == tuple(Units.build(names, 20, 5, 0)[0].members)
    assert len(set(chosen)) > 190
    counts = np.bincount(np.concatenate(chosen), minlength=20)
    assert counts.min() > 25  # 50 expected, standard deviation 6
    assert counts.max() < 75


def test_no_names_are_kept():
    units, _ = Units.build(["secret"] * 3, 3, 1, 0)
    assert "secret" not in repr(units.__dict__)
    assert set(units.__dict__) == {"offsets", "members"}


def test_members_of():
    units, _ = Units.build(["a", "b", "a", "c"], 4, 5, 0)
    examples, of_each = units.members_of(np.array([2, 0]))
    assert examples.tolist() == [3, 0, 2]
    assert of_each.tolist() == [2, 0, 0]
    examples, of_each = units.members_of(np.array([], dtype=np.int64))
    assert len(examples) == len(of_each) == 0


def test_clean_units_makes_one_person_of_two_spellings():
    assert clean_units([" Ann", "Ann\t", "Zoe\u0308", "Zo\u00eb", "  "]) == ["Ann", "Ann", "Zoë", "Zoë", ""]


def test_wrong_calls():
    with pytest.raises(ValueError):
        Units.build(["a", ""], 2, 1, 0)
    with pytest.raises(ValueError):
        Units.build(["a"], 2, 1, 0)
    with pytest.raises(ValueError):
        Units.build(None, 2, 0, 0)
    assert len(Units.build([], 0, 1, 0)[0]) == 0


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 5))))
def test_ranges(pairs):
    expected = [i for start, count in pairs for i in range(start, start + count)]
    starts = np.array([p[0] for p in pairs], dtype=np.int64)
    counts = np.array([p[1] for p in pairs], dtype=np.int64)
    assert ranges(starts, counts).tolist() == expected

"""Faults of runs on several processes: whose noise, whose units, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mutant import caught_by, wrapped

from sotto.distributed import Followers, Group

NOISE = "test_distributed.py::test_the_noise_of_an_update_does_not_depend_on_the_number_of_processes[4"
SAME = "test_distributed.py::test_several_processes_make_the_weights_of_one[weights"
ADAPTIVE = "test_distributed.py::test_several_processes_make_the_weights_of_one[adaptive"


@caught_by(NOISE, 10)
def every_process_adds_noise(m: pytest.MonkeyPatch) -> None:
    """Followers noise what they send as if they were alone: the noise on the sum is sqrt(n) times what was paid for."""

    def add(right: Any, self: Group, total: Any) -> Any:
        if self.rank:
            for value in total.gradients.values():
                value += torch.randn_like(value) * 1.0 * total.sensitivity
        return right(self, total)

    wrapped(m, Group, "add", add)


@caught_by(NOISE, 10)
def noise_is_shared_out_and_the_shares_are_missing(m: pytest.MonkeyPatch) -> None:
    """The leader adds its part of the noise, 1 / sqrt(n) of it, and nobody adds the rest."""

    def gather(right: Any, self: Followers, total: Any) -> Any:
        found = right(self, total)
        found.sensitivity /= self.group.size**0.5
        return found

    wrapped(m, Followers, "gather", gather)


@caught_by(NOISE, 10)
def the_mean_over_processes_is_noised_like_a_sum(m: pytest.MonkeyPatch) -> None:
    """What was released is divided by the number of processes once more."""

    def update(right: Any, self: Followers, values: dict[str, torch.Tensor], clipping: Any) -> None:
        for value in values.values():
            value /= self.group.size
        right(self, values, clipping)

    wrapped(m, Followers, "update", update)


@caught_by(SAME, 10)
def every_process_sums_all_units(m: pytest.MonkeyPatch) -> None:
    """Each unit enters the sum n times, with noise for one."""
    m.setattr(Group, "share", lambda self, units: units)


@caught_by(SAME, 10)
def shares_overlap(m: pytest.MonkeyPatch) -> None:
    """Neighbouring shares have a unit in common, which may then contribute twice its bound."""

    def share(right: Any, self: Group, units: Any) -> Any:
        first, size = self.rank * len(units) // self.size, len(units) // self.size + 1
        return units[first : first + size + 1]

    wrapped(m, Group, "share", share)


@caught_by(SAME, 10)
def a_process_is_forgotten(m: pytest.MonkeyPatch) -> None:
    """The last process's sum never arrives: no danger, but not the run that was promised."""

    def add(right: Any, self: Group, total: Any) -> Any:
        if self.rank == self.size - 1:
            for value in total.gradients.values():
                value.zero_()
        return right(self, total)

    wrapped(m, Group, "add", add)


@caught_by(ADAPTIVE, 10)
def followers_clip_at_an_old_threshold(m: pytest.MonkeyPatch) -> None:
    """The threshold moves at the leader alone, so the others' units may be longer than what the noise covers."""

    def agree_on(right: Any, self: Group, clipping: Any) -> None:
        before = list(clipping.thresholds) if hasattr(clipping, "thresholds") else None
        right(self, clipping)
        if self.rank and before:
            clipping.thresholds = before

    wrapped(m, Group, "agree_on", agree_on)

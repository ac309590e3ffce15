"""A run on a neighbouring dataset looks the same to everyone, and moves each sum by no more than was promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replay
import torch

from sotto import finish, training
from sotto import session as sessions
from sotto.gradients.clipping import Flat
from sotto.privacy.mechanism import GRID_BITS, GaussianMechanism, grid

CLIPPINGS: dict[str, dict[str, str]] = {
    "flat": {"clipping": "flat"},
    "ghost": {"clipping": "flat", "gradient": "ghost"},
    "automatic": {"clipping": "automatic"},
    "adaptive": {"clipping": "adaptive"},
    "layerwise": {"gradient": "layerwise"},
    "adaptive_layerwise": {"clipping": "adaptive", "gradient": "layerwise"},
}
CASES = [("classification", train, clipping) for train in ("full", "lora", "bitfit", "head") for clipping in CLIPPINGS]
CASES += [("completion", train, clipping) for train in ("full", "lora") for clipping in CLIPPINGS]
CASES += [("plain_text", "full", "flat"), ("plain_text", "lora", "adaptive_layerwise")]
EVERY = ("full", "lora")
SELDOM = [(kind, train, clipping) for kind, train, clipping in CASES
          if (train not in EVERY and (train, clipping) not in (("bitfit", "flat"), ("bitfit", "adaptive_layerwise"),
                                                              ("head", "automatic"), ("head", "ghost")))
          or (kind == "completion" and (train == "full") != (clipping in ("flat", "ghost", "layerwise")))]  # fmt: skip
"""Of two choices each pair is tried anyway; these combine them once more, in `make test-slow`."""
SOME = [CASES[0], CASES[9], CASES[24], CASES[-1]]


def check(one: replay.Recording, two: replay.Recording, replaced: bool = False) -> list[float]:
    """All that must hold between the recordings of two neighbours. Returns how far each sum moved."""
    replay.check_public(one, two)
    for seen in (one, two):
        replay.check_noise(seen)
    moved = replay.check_sensitivity(one, two, replaced)
    assert max(moved) > 0.5, "the unit was there, and clipped"
    return moved


@pytest.mark.parametrize(
    ("kind", "train", "clipping"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case in SELDOM), id="-".join(case)) for case in CASES],
)
def test_a_neighbouring_dataset_shows_nowhere_in_public(tmp_path: Path, kind: str, train: str, clipping: str) -> None:
    one, two = replay.pair(tmp_path, kind, {"method": {"train": train, **CLIPPINGS[clipping]}})
    check(one, two)
    assert [ours - theirs for ours, theirs in zip(one.units, two.units, strict=True)] == [1, 0, 1, 1, 0]
    assert two.units[2] == 0


@pytest.mark.parametrize("clipping", ["flat", "adaptive_layerwise"])
def test_exact_noise_shows_no_more(tmp_path: Path, clipping: str) -> None:
    """Releases are whole multiples of the grid, over the divisor, whatever the data was."""
    changes = {"method": {"train": "full", **CLIPPINGS[clipping]}, "privacy": {"exact_noise": True}}
    one, two = replay.pair(tmp_path, "classification", changes)
    check(one, two)
    for seen in (one, two):
        for released, sensitivity in zip(seen.released, seen.sensitivities, strict=True):
            unit = grid(sensitivity, GRID_BITS) / seen.plan.expected_batch_size
            for value in released.values():
                whole = value.double() / unit  # but for the rounding to float32
                assert float((whole - whole.round()).abs().max()) <= float(whole.abs().max()) * 2**-24


@pytest.mark.parametrize(("kind", "train", "clipping"), SOME, ids=map("-".join, SOME))
def test_a_unit_that_is_changed_moves_a_sum_by_twice_the_sensitivity_at_most(
    tmp_path: Path, kind: str, train: str, clipping: str
) -> None:
    method = {"method": {"train": train, **CLIPPINGS[clipping]}}
    check(*replay.pair(tmp_path, kind, method, replay.changed), replaced=True)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_unit_that_breaks_in_training_shows_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clipping: str, value: float
) -> None:
    """The unit's losses are not finite in the second run, where its texts are others."""
    original = training.losses_of

    def losses_of(session: training.Session, examples: np.ndarray) -> torch.Tensor:
        losses = original(session, examples)
        return losses * torch.where(torch.from_numpy(strange(session, examples)), value, 1.0)

    monkeypatch.setattr(training, "losses_of", losses_of)
    one, two = replay.pair(
        tmp_path, "classification", {"method": {"train": "full", **CLIPPINGS[clipping]}}, replay.changed
    )
    check(one, two, replaced=True)


def strange(session: training.Session, examples: np.ndarray) -> np.ndarray:
    """(B,) which examples are those of the unit in which the datasets differ, in the second one."""
    units, lengths = session.data.units, session.data.examples.lengths[examples]
    members = units.members[units.offsets[replay.UNIT] : units.offsets[replay.UNIT + 1]]
    return np.isin(examples, members) & (len(members) == 2) & (lengths.max() >= 16)


def test_a_unit_that_does_not_fit_in_memory_shows_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch is computed in smaller pieces, and no file that may be handed over tells how small they were."""
    original, refused = training.losses_of, list[int]()

    def losses_of(session: training.Session, examples: np.ndarray) -> torch.Tensor:
        if len(examples) > 3 and strange(session, examples).any():
            refused.append(len(examples))
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")
        return original(session, examples)

    monkeypatch.setattr(training, "losses_of", losses_of)
    one, two = replay.pair(tmp_path, "classification", {"method": {"train": "full"}}, replay.changed)
    assert refused
    check(one, two, replaced=True)


# ---- what these checks must not let pass


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[replay.Recording, replay.Recording]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOTTO_LEDGER_DIR", str(tmp_path_factory.mktemp("ledger")))
        return replay.pair(tmp_path_factory.mktemp("twins"), "classification", {"method": {"train": "head"}})


def test_a_sum_that_moves_too_far_is_noticed(recorded: tuple[replay.Recording, replay.Recording]) -> None:
    one, two = recorded
    check(one, two)
    with pytest.raises(AssertionError, match="the sum moved"):
        replay.check_sensitivity(replay.scaled(one, 2.0), replay.scaled(two, 2.0), replaced=False)


def test_unlike_files_weights_and_calls_are_noticed(recorded: tuple[replay.Recording, replay.Recording]) -> None:
    one, two = recorded
    name = "model/README.md"
    for other in (
        replay.replace(two, files={**two.files, name: two.files[name] + b" "}),
        replay.replace(two, files={**two.files, "model/x": b""}),
        replay.replace(two, first={n: w + 1e-7 for n, w in two.first.items()}),
        replay.replace(two, calls=two.calls[:-1]),
        replay.replace(two, shown={**two.shown, "notes": ["an example was skipped"]}),
    ):
        with pytest.raises(AssertionError):
            replay.check_public(one, other)


def faults() -> dict[str, Any]:
    """Small leaks, each of which a loop could well have."""

    def scale_by_the_batch(m: pytest.MonkeyPatch) -> None:
        right = GaussianMechanism.privatize

        def privatize(self: GaussianMechanism, total: Any, step: int) -> Any:
            return right(self, replay.replace(total, sensitivity=total.sensitivity * (1 + len(total.norms))), step)

        m.setattr(GaussianMechanism, "privatize", privatize)

    def divide_by_the_batch(m: pytest.MonkeyPatch) -> None:
        right = GaussianMechanism.privatize

        def privatize(self: GaussianMechanism, total: Any, step: int) -> Any:
            return {n: v * self.divisor / max(1, len(total.norms)) for n, v in right(self, total, step).items()}

        m.setattr(GaussianMechanism, "privatize", privatize)

    def clip_to_something_else(m: pytest.MonkeyPatch) -> None:
        m.setattr(Flat, "threshold", lambda self, norms: 3 * self.clip_norm)

    def export_the_number_of_units(m: pytest.MonkeyPatch) -> None:
        right = finish.write_model

        def write_model(trained: Any, folder: Path, *args: Any) -> None:
            right(trained, folder, *args)
            (folder / "data.json").write_text(str(found[-1]))

        found: list[int] = []
        assemble = sessions._assemble

        def assembled(*args: Any) -> Any:
            session = assemble(*args)
            found.append(len(session.data.units))
            return session

        m.setattr(sessions, "_assemble", assembled)
        m.setattr(finish, "write_model", write_model)

    def skip_a_step_without_units(m: pytest.MonkeyPatch) -> None:
        right = training.clipped_sum

        def clipped_sum(session: training.Session, units: np.ndarray, step: int) -> Any:
            session.stop_requested = session.stop_requested or len(units) == 0
            return right(session, units, step)

        m.setattr(training, "clipped_sum", clipped_sum)

    return {f.__name__: f for f in (scale_by_the_batch, divide_by_the_batch, clip_to_something_else,
                                    export_the_number_of_units, skip_a_step_without_units)}  # fmt: skip


@pytest.mark.parametrize("name", faults())
def test_a_loop_that_leaks_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    faults()[name](monkeypatch)
    with pytest.raises(AssertionError):
        check(*replay.pair(tmp_path, "classification", {"method": {"train": "full"}}))

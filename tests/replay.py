"""Record and replay: one run on a dataset, and the same run on a neighbour, with every random outcome frozen.

What the first run releases (noised updates, noisy counts) is recorded and handed to the second run in place of its own,
and both see the same draws, but for the unit in which the datasets differ. Then both have the same weights throughout,
so whatever else differs is a leak: a public number, a file, a shape, an order of calls, or a clipped sum that moved by
more than its sensitivity. The idea is that of Re:cord-play (arXiv 2602.17454).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_runs
import torch

from sotto import commands, training
from sotto import session as sessions
from sotto.data.sampling import PoissonSampler
from sotto.gradients.clipping import Adaptive
from sotto.privacy.ledger import Ledger
from sotto.privacy.mechanism import GRID_BITS, grid
from sotto.privacy.noise import DebugNoise
from sotto.rundir import RunDir
from sotto.training import Session

UNIT = 7
"""The unit in which the two datasets differ."""
DRAWS = ([2, 7, 11, 30, 31, 58], [0, 5, 40], [7], [7, 8, 9], [])
"""The units of each step. Without unit 7 the third batch is empty; the last one always is."""
ROUNDING = 2e-3
"""Relative to the sensitivity: float32 sums of the same gradients in other microbatches."""


@dataclass
class Recording:
    """One run: what anyone may see of it, and what only the test sees.

    Attributes:
      calls: the parts of the mechanism in the order in which they were called, with everything public about them.
      files: what stands in the run folder, but for the files that are private.
      shown: statement, epsilon, notes and the ledger's entries.
      first: weights before the first step.
      sums, counts, released: clipped sums, counts of unclipped units and true releases of each step.
      sensitivities: what the engine said of each sum.
    """

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)
    first: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: list[dict[str, torch.Tensor]] = field(default_factory=list)
    counts: list[torch.Tensor] = field(default_factory=list)
    released: list[dict[str, torch.Tensor]] = field(default_factory=list)
    fractions: list[torch.Tensor] = field(default_factory=list)
    sensitivities: list[float] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    plan: Any = None


PRIVATE_FILES = ("private/", "metrics.private.jsonl")


def record(
    folder: Path, kind: str, changes: dict[str, Any], *, without_unit: bool = False, like: Recording | None = None
) -> Recording:
    """Runs the whole loop, from the configuration to the exported folder.

    Args:
      folder: holds the data; its run folder is removed from sight at the end, so that the next run has the same paths.
      without_unit: the data does not hold `UNIT`, so that later units have the number before theirs.
      like: the recording whose releases replace this run's own.
    """
    seen = Recording()
    with pytest.MonkeyPatch.context() as patch:
        _freeze(patch, seen, without_unit)
        session = sessions.start(tiny_runs.config(folder, kind, **changes), "x")
        seen.plan = session.plan
        _observe(patch, session, seen, like)
        done = commands.run_session(session, None)
    seen.files = {
        name: path.read_bytes()
        for path in sorted(done.path.rglob("*"))
        if path.is_file() and not (name := str(path.relative_to(done.path))).startswith(PRIVATE_FILES)
    }
    seen.shown = {
        "statement": done.statement, "epsilon": done.epsilon, "notes": done.notes, "steps": done.steps,
        "finished": done.finished, "ledger": _ledger_entries(done.path),
    }  # fmt: skip
    done.path.rename(folder / f"seen-{len(list(folder.glob('seen-*')))}")
    return seen


def _ledger_entries(run: Path) -> list[Any]:
    ledger = Ledger.open(json.loads((run / "private" / "secrets.json").read_text())["ledger"])
    entries = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    ledger.path.unlink()
    ledger.path.with_suffix(".head").unlink()
    return [{k: v for k, v in entry.items() if k not in ("time", "prev", "hash")} for entry in entries]


def _freeze(patch: pytest.MonkeyPatch, seen: Recording, without_unit: bool) -> None:
    """Randomness becomes the same in every run: draws, keys, names, and noise (which still counts as private)."""

    def draw(sampler: PoissonSampler, step: int, attempt: int = 0) -> np.ndarray:
        units = np.array(DRAWS[step], dtype=np.int64)
        if not without_unit:
            return units
        units = units[units != UNIT]
        return units - (units > UNIT)

    class Noise:
        private: ClassVar[bool] = True
        source = DebugNoise(1)

        def normal(self, shape: Any, std: float, *, step: int, name: str, device: torch.device) -> torch.Tensor:
            seen.calls.append(("noise", step, name, tuple(shape), std))
            return self.source.normal(shape, std, step=step, name=name, device=device)

        def rounded(self, shape: Any, std: float, *, step: int, name: str, device: torch.device) -> torch.Tensor:
            seen.calls.append(("noise", step, name, tuple(shape), std))
            return self.source.rounded(shape, std, step=step, name=name, device=device)

    def planned(config: Any, stem: str) -> RunDir:
        return RunDir(Path(config.output.dir) / "the-run")

    patch.setattr(PoissonSampler, "draw", draw)
    patch.setattr(sessions, "SecureNoise", Noise)
    patch.setattr(sessions.secrets, "token_bytes", lambda size: bytes(size))
    patch.setattr(RunDir, "planned", staticmethod(planned))
    patch.setattr(os, "getpid", lambda: 1)  # stands in the names of temporary files


def _observe(patch: pytest.MonkeyPatch, session: Session, seen: Recording, like: Recording | None) -> None:
    """Notes each call of the mechanism's parts, and puts the recorded releases in place of this run's own."""
    seen.first = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    mechanism, clipping = session.mechanism, session.engine.clipping
    privatize, step_of, reserve = mechanism.privatize, session.optimizer.step, session.budget.reserve
    save, draw = training.save_checkpoint, session.sampler.draw

    def observed(total: Any, step: int) -> dict[str, torch.Tensor]:
        shapes = [(n, tuple(g.shape), g.dtype) for n, g in total.gradients.items()]
        seen.calls.append(("privatize", step, total.sensitivity, total.group_norms.shape[1], shapes))
        seen.sums.append({n: g.detach().clone() for n, g in total.gradients.items()})
        seen.sensitivities.append(total.sensitivity)
        seen.units.append(len(total.norms))
        released = privatize(total, step)
        seen.released.append(released)
        return released if like is None else {n: v.clone() for n, v in like.released[len(seen.released) - 1].items()}

    def follow(fraction: torch.Tensor) -> None:
        seen.fractions.append(fraction)
        type(clipping).follow(clipping, fraction if like is None else like.fractions[len(seen.fractions) - 1])

    def count(norms: torch.Tensor) -> torch.Tensor:
        seen.counts.append(type(clipping).count_unclipped(clipping, norms))
        return seen.counts[-1]

    def noting(name: str, call: Any, *public: int) -> Any:
        def noted(*args: Any) -> Any:
            seen.calls.append((name, *(args[i] for i in public)))
            return call(*args)

        return noted

    patch.setattr(mechanism, "privatize", observed)
    patch.setattr(session.optimizer, "step", noting("update", step_of, 1))
    patch.setattr(session.budget, "reserve", noting("reserve", reserve, 0))
    patch.setattr(session.sampler, "draw", noting("draw", draw, 0, 1))
    patch.setattr(training, "save_checkpoint", noting("checkpoint", save))
    if isinstance(clipping, Adaptive):
        patch.setattr(clipping, "follow", follow)
        patch.setattr(clipping, "count_unclipped", count)


# ---- what must agree


def check_public(one: Recording, two: Recording) -> None:
    """Everything that anyone may see is the same, to the last byte."""
    assert one.plan == two.plan
    assert one.first.keys() == two.first.keys()
    for name, weight in one.first.items():
        assert torch.equal(weight, two.first[name]), f"before the first step: {name}"
    assert one.calls == two.calls
    assert one.shown == two.shown
    assert one.files.keys() == two.files.keys()
    for name, content in one.files.items():
        assert content == two.files[name], name


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """L2 distance, in float64."""
    assert one.keys() == two.keys()
    return float(sum((one[n].double() - two[n].double()).square().sum() for n in one)) ** 0.5


def check_sensitivity(one: Recording, two: Recording, replaced: bool) -> list[float]:
    """No step's sum moved by more than it may, nor its release by more than that over the divisor.

    Returns:
      How far each step's sum moved, in units of its sensitivity.
    """
    plan, most = one.plan, 2.0 if replaced else 1.0
    moved = []
    for step, sensitivity in enumerate(one.sensitivities):
        if plan.clipping != "adaptive":
            assert sensitivity == pytest.approx(plan.clip_norm, rel=1e-9)
        bound = sensitivity * ((most if UNIT in DRAWS[step] else 0.0) + ROUNDING)
        of_sum = distance(one.sums[step], two.sums[step])
        of_release = distance(one.released[step], two.released[step])
        assert of_sum <= bound, f"step {step}: the sum moved by {of_sum}, the sensitivity is {sensitivity}"
        assert of_release <= bound / plan.expected_batch_size, f"step {step}: the release moved by {of_release}"
        moved.append(of_sum / sensitivity)
    for ours, theirs in zip(one.counts, two.counts, strict=True):
        assert float((ours - theirs).abs().max()) <= most / 2
    for ours, theirs in zip(one.fractions, two.fractions, strict=True):
        assert float((ours - theirs).abs().max()) <= (most / 2 + 1e-9) / plan.expected_batch_size
    return moved


def check_noise(seen: Recording) -> None:
    """Every step adds noise of the planned deviation to every coordinate of what it releases, and is charged, once."""
    plan = seen.plan
    assert [call[1] for call in seen.calls if call[0] == "privatize"] == list(range(plan.steps))
    charged = [entry["event"] for entry in seen.shown["ledger"] if entry["kind"] == "reserve"]
    for event in charged:
        assert (event["noise_multiplier"], event["sampling_prob"]) == (plan.noise_multiplier, plan.sampling_prob)
    assert len(charged) == plan.steps
    for step, sensitivity in enumerate(seen.sensitivities):
        drawn = [call for call in seen.calls if call[0] == "noise" and call[1] == step]
        on_sum = [call for call in drawn if call[2] != "count_unclipped"]
        on_counts = [call for call in drawn if call[2] == "count_unclipped"]
        assert sum(int(np.prod(call[3])) for call in on_sum) == sum(g.numel() for g in seen.sums[step].values())
        assert len({call[2] for call in drawn}) == len(drawn)
        # Sensitivity over deviation, squared and added up over the parts of the release, is what the plan bought.
        (deviation,) = {call[4] for call in on_sum}
        moves, half = sensitivity, 0.5
        if plan.exact_noise:  # all in units of the grid: rounding moves every number by half a unit, in both sums
            unit, numbers = grid(sensitivity, GRID_BITS), sum(g.numel() for g in seen.sums[step].values())
            moves, half = sensitivity / unit + numbers**0.5, 1.0
        spent = (moves / deviation) ** 2
        spent += sum(call[3][0] * half**2 / call[4] ** 2 for call in on_counts)
        assert spent * plan.noise_multiplier**2 == pytest.approx(1, rel=1e-6 if plan.exact_noise else 1e-9)
        assert spent <= (1 + 1e-12) / plan.noise_multiplier**2 or not plan.exact_noise
        assert bool(on_counts) == (plan.clipping == "adaptive")


# ---- neighbours


def removed(table: list[dict[str, str]]) -> list[dict[str, str]]:
    """The dataset without the unit."""
    return [row for row in table if row["who"] != tiny_runs.unit_name(UNIT)]


def changed(table: list[dict[str, str]]) -> list[dict[str, str]]:
    """The unit has other rows: one that is longer than any, and one of a word that nobody knows."""
    first = next(i for i, row in enumerate(table) if row["who"] == tiny_runs.unit_name(UNIT))
    text = " ".join(f"w{i}" for i in range(50))
    rows = [{**table[first], "text": t, "completion": t, "prompt": "w1 ", "label": "good"} for t in (text, "unheard")]
    return [*removed(table)[:first], *rows, *removed(table)[first:]]


def pair(folder: Path, kind: str, changes: dict[str, Any], neighbour: Any = removed) -> tuple[Recording, Recording]:
    """The recordings of one run and of the same on a neighbouring dataset, the second with the first one's releases."""
    write = tiny_runs.write_csv if kind == "classification" else tiny_runs.write_jsonl
    data = folder / ("notes.csv" if kind == "classification" else "letters.jsonl")
    changes = tiny_runs.merge(
        {"run": {"steps": len(DRAWS), "microbatch_size": 4, "learning_rate": 0.05}, "method": {"clip_norm": 0.05}},
        changes,
    )
    one = record(folder, kind, changes)
    write(data, neighbour(tiny_runs.rows()))
    return one, record(folder, kind, changes, without_unit=neighbour is removed, like=one)


def scaled(seen: Recording, factor: float) -> Recording:
    """A recording whose sums are `factor` times as long."""
    return replace(seen, sums=[{n: g * factor for n, g in s.items()} for s in seen.sums])

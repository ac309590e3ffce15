"""Every kind of run clips, noises, draws and charges as its plan says: measured on the parts that it will run with.

Parts that are right by themselves can still be put together wrongly for one method alone. Here the parts of every kind
of run are asked what they do, whatever their names: noise is measured on releases of an empty sum, the bound on the
gradients of single units, and the plan is compared with what the ledger is told. A resumed run is asked again.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch

from sotto import session as sessions
from sotto import training
from sotto.privacy.ledger import Ledger
from sotto.privacy.mechanism import AdaptiveGaussianMechanism
from sotto.training import Session

CLIP = 1e-4
"""Far below the length of any gradient, so that every unit is cut, and an error of scale shows."""
ZEROTH = {"gradient": "zeroth_order", "zeroth_probes": 3}
SIDE, REVERSIBLE = {"train": "side", "side_reduction": 2}, {"train": "reversible"}
SERVED: dict[str, Any] = {"kind": "federated", "local_batch_size": 2, "local_learning_rate": 0.5}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"method": {"train": "full"}},
    "per-example": {"method": {"train": "lora", "gradient": "per_example"}},
    "automatic": {"method": {"train": "head", "clipping": "automatic"}},
    "adaptive-layerwise": {"method": {"train": "lora", "clipping": "adaptive", "gradient": "layerwise"}},
    "exact": {"method": {"train": "bitfit"}, "privacy": {"exact_noise": True}},
    "exact-adaptive": {"method": {"train": "bitfit", "clipping": "adaptive"}, "privacy": {"exact_noise": True}},
    "replace-one": {"method": {"train": "head"}, "privacy": {"neighboring_relation": "replace_one"}},
    "record": {"method": {"train": "head"}, "privacy": {"unit": "record", "max_examples_per_unit": 1}},
    "dropout": {"method": {"train": "full", "dropout": True}},
    "bfloat16": {"method": {"train": "full"}, "model": {"dtype": "bfloat16"}},
    "int8": {"method": {"train": "lora", "frozen_weights": "int8"}},
    "int4": {"method": {"train": "lora", "frozen_weights": "int4"}},
    "sgd": {"method": {"train": "full"}, "run": {"optimizer": "sgd", "momentum": 0.9, "ema_decay": 0.5}},
    "side": {"method": SIDE},
    "side-cached": {"method": {**SIDE, "side_cache": True}},
    "reversible": {"method": REVERSIBLE},
    "reversible-float32": {"method": {**REVERSIBLE, "reversible_streams": "float32"}},
    "zeroth": {"method": ZEROTH},
    "zeroth-adaptive": {"method": {**ZEROTH, "clipping": "adaptive"}},
    "zeroth-automatic": {"method": {**ZEROTH, "clipping": "automatic"}},
    "zeroth-dpzero": {
        "method": {"gradient": "zeroth_order", "zeroth_preset": "dpzero"},
        "privacy": {"neighboring_relation": "replace_one"},
    },
    "zeroth-dpzopo": {"method": {"gradient": "zeroth_order", "zeroth_preset": "dpzopo", "train": "full"}},
    "zeroth-sides": {"method": {**ZEROTH, "zeroth_sides": 2}},
    "zeroth-side": {"method": {**ZEROTH, **SIDE}},
    "forward": {"method": {**ZEROTH, "zeroth_smoothing": 0}},
    "laplace": {"method": {**ZEROTH, "zeroth_noise": "laplace"}},
    "laplace-forward": {"method": {**ZEROTH, "zeroth_noise": "laplace", "zeroth_smoothing": 0}},
    "users": {"setting": SERVED},
    "users-adaptive": {"setting": SERVED, "method": {"train": "head", "clipping": "adaptive"}},
    "users-exact": {"setting": SERVED, "privacy": {"exact_noise": True}},
    "users-codec": {"setting": {**SERVED, "codec": "srht", "latent": 300}},
    "users-zeroth": {"setting": SERVED, "method": ZEROTH},
    "users-spry": {"setting": {**SERVED, "parts": 2}, "method": {**ZEROTH, "train": "lora", "zeroth_smoothing": 0}},
    "sites": {"setting": {**SERVED, "sites": 3}},
}
CASES = [("classification", name) for name in RUNS]
CASES += [("completion", name) for name in RUNS if "users" not in name or name == "users-spry"]
NO_BIAS = ("bitfit", "head")


def configuration(folder: Path, kind: str, name: str) -> Any:
    changes = {"run": {"steps": 3, "microbatch_size": 4}, **RUNS[name]}
    changes["run"] = {"steps": 3, "microbatch_size": 4, **RUNS[name].get("run", {})}
    method = {"clip_norm": CLIP, **RUNS[name].get("method", {})}
    if kind == "completion" and method.get("train") in NO_BIAS:
        method["train"] = "lora"
    return tiny_runs.config(folder, kind, **{**changes, "method": method})


def check(session: Session) -> None:
    plan, ledger = session.plan, getattr(session.budget, "ledger", None)
    assert plan.private
    assert isinstance(ledger, Ledger)
    record = ledger.runs[session.run.id]
    assert (record.event, record.planned, record.delta) == (plan.event, plan.total_steps, plan.delta)
    assert record.neighboring_relation == plan.neighboring_relation == session.config.privacy.neighboring_relation
    assert plan.epsilon_after(plan.total_steps) <= session.config.privacy.epsilon * (1 + 1e-9)
    sites = (plan.setting or {}).get("sites")
    drawn = (sites, 1.0) if sites else (tiny_runs.UNITS, plan.sampling_prob)
    if session.config.privacy.unit == "record":
        drawn = (len(session.data.units), plan.sampling_prob)
    assert (session.sampler.num_units, session.sampler.sampling_prob) == drawn
    assert plan.sampling_prob == session.config.run.expected_batch_size / session.config.privacy.num_units
    check_noise(session)
    check_bound(session, sites)


def check_noise(session: Session) -> None:
    """The deviation of what an empty sum becomes, from at least 3,000 numbers: within 7 standard errors."""
    plan, mechanism, empty = session.plan, session.mechanism, session.engine.zeros()
    assert empty.sensitivity == pytest.approx(CLIP, rel=1e-9)
    expected = plan.noise_multiplier * CLIP / session.config.run.expected_batch_size
    if plan.noise == "laplace":
        expected *= math.sqrt(2)
    if session.config.method.clipping == "adaptive":
        assert isinstance(mechanism, AdaptiveGaussianMechanism)
        expected /= math.sqrt(1 - session.config.method.clip_share)
    found: list[np.ndarray] = []
    while sum(map(len, found)) < 3000:
        total = dataclasses.replace(empty, gradients={n: g.clone() for n, g in empty.gradients.items()})
        released = mechanism.privatize(total, 0)
        found.append(torch.cat([g.double().flatten() for g in released.values()]).numpy())
        if session.config.method.clipping == "adaptive":
            session.engine.clipping.thresholds = list(session_thresholds(session))  # type: ignore[union-attr]
    drawn = np.concatenate(found)
    error = math.sqrt((5.0 if plan.noise == "laplace" else 2.0) / (4 * len(drawn)))
    assert drawn.std() == pytest.approx(expected, rel=7 * error)
    assert abs(drawn.mean()) < 7 * expected / math.sqrt(len(drawn))


def silent(session: Session) -> bool:
    """Whether no loss has moved yet: a head that begins at zero hides what lies below it."""
    method = session.config.method
    return method.zeroth_order and (method.zeroth_preset == "dpzopo" or session.plan.parts > 1)


def session_thresholds(session: Session) -> list[float]:
    """The thresholds that the run begins with: they moved with what was measured here."""
    count = len(session.engine.clipping.thresholds)  # type: ignore[union-attr]
    return [CLIP / math.sqrt(count)] * count


def check_bound(session: Session, sites: int | None) -> None:
    """No unit adds more than the bound, and units, whose gradients are far longer, add much of it."""
    if session.config.method.side_cache:
        return  # what is stored is filled in when the loop begins
    lengths = []
    for unit in range(sites or 4):
        total = training.clipped_sum(session, np.array([unit]), 0)
        order = 1 if session.plan.noise == "laplace" else 2
        numbers = torch.cat([g.double().flatten() for g in total.gradients.values()])
        lengths.append(float(torch.linalg.vector_norm(numbers, order)))
    if sites:
        return  # a site's sum is of many units: its server bounds it by their number
    assert max(lengths) <= CLIP * (1 + 1e-5)
    assert max(lengths) > 0.1 * CLIP or (session.config.data.task == "classification" and silent(session))


@pytest.mark.parametrize(("kind", "name"), CASES, ids=map("-".join, CASES))
def test_a_run_does_what_its_plan_says(tmp_path: Path, kind: str, name: str) -> None:
    torch.manual_seed(0)
    session = sessions.start(configuration(tmp_path, kind, name), "x")
    check(session)
    session.held.close()
    session.engine.detach()
    again = sessions.resume(session.run.path)
    check(again)
    again.held.close()

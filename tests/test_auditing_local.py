"""What a text or a label of a split run is promised: attacked, near the promise, and past it where noise is missing."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest

from sotto.auditing import local
from sotto.auditing.report import AuditReport
from sotto.auditing.split import SplitReport
from sotto.config_split import SplitSetting
from sotto.privacy.noise import DebugNoise
from sotto.split import labels
from sotto.split.privatizers import GaussianRelease, Plain

BASE: dict[str, Any] = {"kind": "split", "privatizer": "none"}
TEXTS: list[dict[str, Any]] = [{"privatizer": "gaussian", "layer": 1}, {"privatizer": "gaussian_pooled"}]


def audit(changes: dict[str, Any], privatizer: Any = None, trials: int = 4000) -> AuditReport:
    setting = SplitSetting.model_validate({**BASE, **changes})
    if privatizer is None:
        privatizer = Plain()
        if setting.epsilon is not None:
            rows = 1 if setting.pooled else 8
            privatizer = GaussianRelease.calibrated(rows, setting.pooled, setting.clip_norm, setting.epsilon, 1e-5)
    (report,) = local.audit_promises(setting, privatizer, 16, 3, 4, DebugNoise(2), trials)
    return report


@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("text", TEXTS, ids=lambda t: t["privatizer"])
def test_a_text_is_protected_and_not_by_much(text: dict[str, Any], epsilon: float):
    report = audit({**text, "epsilon": epsilon, "clip_norm": 0.3})
    assert not report.bug
    assert report.lower < epsilon
    assert report.lower > (0.3 if epsilon < 2 else 0.5) * epsilon


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: t["privatizer"])
def test_less_noise_than_promised_is_a_bug(text: dict[str, Any]):
    setting = SplitSetting.model_validate({**BASE, **text, "epsilon": 4.0})
    right = GaussianRelease.calibrated(1 if setting.pooled else 8, setting.pooled, 1.0, 4.0, 1e-5)
    report = audit({**text, "epsilon": 4.0}, dataclasses.replace(right, std=right.std / math.sqrt(2)))
    assert report.bug
    assert "BUG" in report.render()


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_labels(epsilon: float, monkeypatch: pytest.MonkeyPatch):
    changes, seeded = {"labels": "randomised", "label_epsilon": epsilon}, random.Random(3).randrange
    monkeypatch.setattr(local, "randomise", lambda given, k, e: labels.randomise(given, k, e, seeded))
    report = audit(changes, trials=12_000)
    assert not report.bug
    assert report.delta == 0
    assert report.lower > 0.5 * epsilon
    monkeypatch.setattr(local, "randomise", lambda given, k, e: labels.randomise(given, k, 2 * e, seeded))
    assert audit(changes, trials=12_000).bug, "the twin"


@pytest.mark.parametrize("epsilon", [2.0, 6.0])
def test_kept_labels(epsilon: float, monkeypatch: pytest.MonkeyPatch):
    changes = {"labels": "kept", "label_epsilon": epsilon}
    report = audit(changes)
    assert not report.bug
    assert report.lower > 0.5 * epsilon
    monkeypatch.setattr(labels, "LABEL_DISTANCE", 0.7)  # half of what two labels are apart
    assert audit(changes).bug, "the twin"


def test_where_nothing_is_promised_nothing_is_attacked():
    setting = SplitSetting.model_validate({**BASE, "privatizer": "dx_hidden", "eta": 3.0})
    assert local.audit_promises(setting, Plain(), 8, 2, 3, DebugNoise(0)) == ()


def test_a_split_report_says_bug_if_a_promise_is_refuted():
    promise = audit({"labels": "randomised", "label_epsilon": 1.0}, trials=400)
    report = SplitReport("none", 0, {"x": 0.5}, {"x": 0.4}, {"x": 0.3}, 0.1, 0.0, 0.5, 0.5, None, 3, 9, (promise,))
    assert not report.bug
    assert "randomised labels" in report.render()
    refuted = dataclasses.replace(report, promises=(promise, dataclasses.replace(promise, certain=1.5)))
    assert refuted.bug
    assert refuted.to_dict()["bug"]
    assert refuted.to_dict()["promises"][1]["lower"] == promise.lower
    assert np.isfinite(promise.lower)

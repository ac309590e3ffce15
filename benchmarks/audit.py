"""What `sotto audit` proves about every method, beside what is promised: one row for each method and epsilon.

    python benchmarks/audit.py [--method book_keeping ...] [--epsilon 4 ...] [--canaries 5000]

Each row is one white-box audit with gradient (Dirac) canaries of a whole run's releases: 100 steps, every canary drawn
with probability 0.1, delta 1e-5; or one step of all, where the row says so. No model and no text is read. All bounds
hold with 95 % confidence, each by itself; a row is one run, so one bound in twenty may be above the truth by chance.
Rows of split training attack the privatizers with their worst inputs, as often as there are canaries.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "book_keeping": {"method": {"gradient": "book_keeping"}},
    "ghost": {"method": {"gradient": "ghost"}},
    "layerwise": {"method": {"gradient": "layerwise"}},
    "book_keeping, adaptive clipping": {"method": {"clipping": "adaptive"}},
    "book_keeping, exact noise": {"privacy": {"exact_noise": True}},
    "zeroth_order": {"method": {"gradient": "zeroth_order"}},
    "zeroth_order, Laplace": {"method": {"gradient": "zeroth_order", "zeroth_preset": "dpzo",
                                         "zeroth_noise": "laplace"}},
    "zeroth_order, Laplace, one step of all": {"method": {"gradient": "zeroth_order", "zeroth_preset": "dpzo",
                                                          "zeroth_noise": "laplace"},
                                               "run": {"steps": 1, "expected_batch_size": 10_000}},
    "federated, users, noise of the server": {"setting": {"kind": "federated"}},
    "federated, users, noise of users": {"setting": {"kind": "federated", "noise": "clients"}},
    "federated, 4 sites, noise of sites": {"setting": {"kind": "federated", "sites": 4, "noise": "clients"}},
}  # fmt: skip
SPLIT: dict[str, dict[str, Any]] = {
    "split, a text, gaussian": {"privatizer": "gaussian", "epsilon": ...},
    "split, a text, gaussian_pooled": {"privatizer": "gaussian_pooled", "epsilon": ...},
    "split, labels kept": {"privatizer": "none", "labels": "kept", "label_epsilon": ...},
    "split, labels randomised": {"privatizer": "none", "labels": "randomised", "label_epsilon": ...},
}
"""`...` is where epsilon goes."""
EPSILONS = (1.0, 2.0, 4.0, 8.0)
STEPS, SAMPLING, UNITS = 100, 0.1, 10_000


def configuration(changes: dict[str, Any], epsilon: float) -> Any:
    from sotto.config import Config

    values: dict[str, Any] = {
        "model": {"name": "none is read"},
        "data": {"train": "none.csv", "text": "text", "label": "label", "labels": ["a", "b"]},
        "privacy": {"unit": "record", "num_units": UNITS, "epsilon": epsilon, "delta": 1e-5},
        "run": {"expected_batch_size": int(SAMPLING * UNITS), "steps": STEPS, "spare_steps": 0},
    }
    for section, content in changes.items():
        values[section] = {**values.get(section, {}), **content}
    return Config.from_dict(values)


def audit_split(changes: dict[str, Any], epsilon: float, trials: int) -> Any:
    """What one text or label is promised: texts of 32 tokens of width 64; four classes, answered for four times."""
    from sotto.auditing.local import audit_promises
    from sotto.config_split import SplitSetting
    from sotto.privacy.noise import SecureNoise
    from sotto.split.privatizers import GaussianRelease, Plain

    values = {key: epsilon if value is ... else value for key, value in changes.items()}
    setting = SplitSetting.model_validate({"kind": "split", "layer": 1, **values})
    privatizer: Any = Plain()
    if setting.epsilon is not None:
        rows = 1 if setting.pooled else 32
        privatizer = GaussianRelease.calibrated(rows, setting.pooled, setting.clip_norm, epsilon, setting.delta)
    (report,) = audit_promises(setting, privatizer, 64, 4, 4, SecureNoise(), trials)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", choices=[*METHODS, *SPLIT])
    parser.add_argument("--epsilon", action="append", type=float)
    parser.add_argument("--canaries", type=int, default=5000)
    given = parser.parse_args()

    import sotto

    print("| method | epsilon, at most | epsilon, at least | of it | noise strength | two Gaussians | Clopper-Pearson "
          "| one run | CPU s |")  # fmt: skip
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in given.method or [*METHODS, *SPLIT]:
        for epsilon in given.epsilon or EPSILONS:
            begun = time.process_time()
            if name in SPLIT:
                report = audit_split(SPLIT[name], epsilon, given.canaries)
            else:
                report = sotto.audit(configuration(METHODS[name], epsilon), canaries=given.canaries)
            found = {bound.method: f"{bound.epsilon:.2f}" for bound in report.bounds}
            found |= {"strength": found.get("sampled_gaussian") or found.get("sampled_laplace", "-")}
            cells = [found.get(m, "-") for m in ("strength", "gaussian", "clopper_pearson", "one_run")]
            spent = time.process_time() - begun
            print(f"| {name} | {report.claimed:.2f} | {report.lower:.2f} | {report.lower / report.claimed:.2f} "
                  f"| {' | '.join(cells)} | {spent:.0f} |{' BUG' if report.bug else ''}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

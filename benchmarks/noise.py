"""What secure noise costs: the mechanism's share of a clipped step of 64 examples, and draws in a second.

    python benchmarks/noise.py [--case bert-T128-lora ...] [--rounds 3] [--threads 2] [--draws]

A round takes one step (microbatches of 8, book-keeping) and then the noise for its sum from each source in turn, so
that a drift of the machine hits all of them; a share is the median over the rounds of the noise's time by that of the
same round's step without noise. `float` is `SecureNoise` in float64, `exact` the same cipher on the integer grid
(`privacy.exact_noise`), `numpy` is what noise costs without a cipher: PCG64 in the same float64 mechanism.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engine import Task, build

CASES = ["bert-T128-lora", "bert-T128-full", "gpt2-T128-lora", "gpt2-T128-full"]
EXAMPLES = 64
DRAWS = 1 << 22


def seconds(action: Callable[[], Any]) -> tuple[float, float]:
    """Wall seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def sources(threads: int) -> dict[str, Any]:
    """Name -> mechanism."""
    from sotto.privacy.mechanism import GaussianMechanism
    from sotto.privacy.noise import DebugNoise, SecureNoise

    secure = SecureNoise(threads)
    return {
        "float": GaussianMechanism(1.0, EXAMPLES, secure),
        "exact": GaussianMechanism(1.0, EXAMPLES, secure, exact=True),
        "numpy": GaussianMechanism(1.0, EXAMPLES, DebugNoise(1)),
    }


def measure(case: str, rounds: int, threads: int) -> list[str]:
    """One row of the table for each source."""
    import torch

    import sotto

    torch.set_num_threads(threads)
    kind, shape, trained = case.split("-")
    model, task = build(kind, trained), Task(kind, shape, "cpu")
    engine = sotto.attach(model, algorithm="book_keeping")
    total = engine.backward(task.own(model))  # the probe of the first step is not counted
    numbers = sum(value.numel() for value in total.gradients.values())

    def step() -> None:
        sum_ = engine.zeros()
        for _ in range(EXAMPLES // task.batch):
            sum_ += engine.backward(task.own(model))

    mechanisms, found = sources(threads), []
    for number in range(rounds):
        times = {"step": seconds(step)}
        for name, mechanism in mechanisms.items():
            times[name] = seconds(lambda mechanism=mechanism, n=number: mechanism.privatize(total, n))
        found.append(times)
    rows = []
    for name in mechanisms:
        cpu, wall = (statistics.median(r[name][i] / r["step"][i] for r in found) for i in (1, 0))
        own, whole = (statistics.median(r[which][1] for r in found) for which in (name, "step"))
        rows.append(
            f"| {case} | {numbers:,} | {whole:.2f} | {name} | {own:.3f} | {100 * cpu:.1f} % | {100 * wall:.1f} % |"
        )
    return rows


def draws() -> list[str]:
    """Millions of draws in a CPU second, of one thread."""
    import numpy as np
    import torch

    from sotto.privacy.noise import SecureNoise

    noise, where = SecureNoise(1), {"step": 0, "name": "w", "device": torch.device("cpu")}
    plain = np.random.Generator(np.random.PCG64(1))
    kinds: dict[str, Callable[[], Any]] = {
        "float": lambda: noise.normal((DRAWS,), 1.0, **where),
        "exact": lambda: noise.rounded((DRAWS,), 2.0**24, **where),
        "numpy": lambda: plain.standard_normal(DRAWS),
    }
    return [
        f"| {name} | {DRAWS / min(seconds(draw)[1] for _ in range(5)) / 1e6:.0f} million |"
        for name, draw in kinds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draws", action="store_true", help="draws in a second alone")
    given = parser.parse_args()
    if given.draws:
        print("| source | draws in a CPU second |\n|---|--:|", *draws(), sep="\n")
        return
    print("| case | numbers | step, CPU s | noise | CPU s | of the step, CPU | of the step, wall |")
    print("|---|--:|--:|---|--:|--:|--:|")
    for case in given.case or CASES:
        print("\n".join(measure(case, given.rounds, given.threads)), flush=True)


if __name__ == "__main__":
    main()

"""What each choice of trained weights costs and gives: score, peak memory and seconds per step at one budget.

    python benchmarks/methods.py recipes/sst2.yaml --epsilon 2 --epsilon 8 [--method side] [--set run.steps=24 ...]

The recipe's run with `method.train` set to full, lora, bitfit, side and reversible, at the learning rates of `RATES`
(or those given with `--rate`). Each row has a process of its own, and a second one of three steps for the peak above
the built model, in which memory that is freed is given back at once; with `--once` it is the run itself. Seconds are
CPU seconds of a step, the median. `cached` is `side` with stored outputs of the frozen model; its seconds are those of
steps after they were stored.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engine import HONEST_MALLOC, Meter

METHODS: dict[str, list[str]] = {
    "full": ["method.train=full"],
    "lora": ["method.train=lora"],
    "bitfit": ["method.train=bitfit"],
    "side": ["method.train=side"],
    "reversible": ["method.train=reversible"],
    "cached": ["method.train=side", "method.side_cache=true"],
}
RATES = {
    "sst2": {"full": 1e-3, "lora": 6e-3, "bitfit": 5e-3, "side": 6e-3, "reversible": 6e-3, "cached": 6e-3},
    "e2e": {"full": 1e-2, "lora": 1e-2, "bitfit": 2e-2, "side": 1e-2, "reversible": 1e-2, "cached": 1e-2},
}


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Trains once: the median step's seconds and the peak, and the scores unless only memory was asked for."""
    import torch

    from sotto import commands, session
    from sotto.config import Config

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SOTTO_LEDGER_DIR"] = f"{folder}/ledger"
        changes = [*METHODS[args.child], f"output.dir={folder}/runs", "output.export=merged", *args.set]
        if args.child in ("side", "reversible", "cached"):
            changes.append("method.lora_layers=null")
        if args.memory:
            changes.append("run.steps=3")
        begun = session.start(Config.load(args.recipe, changes), args.child)
        meter, clock, seconds, peaks = Meter("cpu"), [time.process_time()], [], []
        meter._reset_peak()

        def progress(step: int, values: dict[str, Any]) -> None:
            seconds.append(time.process_time() - clock[0])
            peaks.append((meter._peak() - meter.base) / 2**20)
            if args.memory and step == 3:
                print(json.dumps({"mebibytes": max(peaks)}), flush=True)
                os._exit(0)
            meter._reset_peak()
            clock[0] = time.process_time()

        run = commands.run_session(begun, progress)
        scores = commands.evaluate(run.path)
        cost = {"seconds": statistics.median(seconds[1:]), "steps": len(seconds), "mebibytes": max(peaks)}
        return {"epsilon": run.epsilon, **cost, **scores}


def row(method: str, epsilon: str, rate: float, args: argparse.Namespace, memory: bool) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    changes = [f"privacy.epsilon={epsilon}", f"run.learning_rate={rate}", *args.set]
    command = [sys.executable, __file__, str(args.recipe), "--child", method, "--threads", str(args.threads)]
    command += [word for change in changes for word in ("--set", change)] + ["--memory"] * memory
    honest = HONEST_MALLOC if memory or args.once else {}
    done = subprocess.run(command, env=environment | honest, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--epsilon", action="append")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--rate", action="append", type=float, help="learning rates to try; default: one a method")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--once", action="store_true", help="memory and time of one run: less to wait for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args)))
        return
    print("| method | learning rate | epsilon | scores | MiB above the model | s/step | steps |")
    print("|---|--:|--:|---|--:|--:|--:|")
    for method in args.method or [m for m in METHODS if m != "cached"]:
        peak = None
        for epsilon in args.epsilon or ["2", "8"]:
            for rate in args.rate or [RATES[args.recipe.stem][method]]:
                if not args.once:
                    peak = peak or row(method, epsilon, rate, args, True)["mebibytes"]
                found = row(method, epsilon, rate, args, False)
                spent, seconds, steps, most = (found.pop(n) for n in ("epsilon", "seconds", "steps", "mebibytes"))
                peak = most if args.once else peak
                scores = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                spent = "none" if spent is None else f"{spent:.2f}"
                print(
                    f"| {method} | {rate:g} | {spent} | {scores} | {peak:.0f} | {seconds:.2f} | {steps} |", flush=True
                )


if __name__ == "__main__":
    main()

"""What each choice of trained weights costs and gives: score, peak memory and seconds per step at one budget.

    python benchmarks/methods.py recipes/sst2.yaml --epsilon 2 --epsilon 8 [--method side] [--set run.steps=24 ...]

The recipe's run with `method.train` set to full, lora, bitfit, side and reversible, at the learning rates of `RATES`
(or those given with `--rate`). `zeroth_head`, `zeroth_lora` and so on train these from losses alone, by the default
preset at its default rate. `probe_lora` trains the head for half of the steps and then LoRA from there, both at the
noise that all of the steps together have. Each row has a process of its own, and a second one of three steps for the
peak above the built model, in which memory that is freed is given back at once; with `--once` it is the run itself.
Seconds are CPU seconds of a step (on CUDA wall seconds), the median, and of all steps. Passes are those of an expected
batch, forward and backward. `cached` is `side` with stored outputs of the frozen model; its seconds are those of steps
after they were stored.
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
    "probe_lora": ["method.train=lora"],
    **{
        f"zeroth_{train}": [f"method.train={train}", "method.gradient=zeroth_order"]
        for train in ("head", "lora", "bitfit", "side", "full")
    },
}
ASKED_FOR = ("cached", "probe_lora", *(name for name in METHODS if name.startswith("zeroth")))
"""Those that are left out where none is named."""
PROBE_RATE = 1e-2
RATES = {
    "sst2": {"full": 1e-3, "lora": 6e-3, "bitfit": 5e-3, "side": 6e-3, "reversible": 6e-3, "cached": 6e-3},
    "e2e": {"full": 1e-2, "lora": 1e-2, "bitfit": 2e-2, "side": 1e-2, "reversible": 1e-2, "cached": 1e-2},
}


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Trains once: seconds, passes and the peak, and the scores unless only memory was asked for."""
    import torch

    from sotto.config import Config

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SOTTO_LEDGER_DIR"] = f"{folder}/ledger"
        changes = [*METHODS[args.child], f"output.dir={folder}/runs", "output.export=merged", *args.set]
        if args.child in ("side", "reversible", "cached", "zeroth_side"):
            changes.append("method.lora_layers=null")
        if args.memory:
            changes.append("run.steps=3")
        config = Config.load(args.recipe, changes)
        if args.child != "probe_lora" or args.memory:
            return trained(config, args)[1]
        return after_probe(config, args)


def after_probe(config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The head alone for half of the steps, then everything from there: one noise, and the ledger adds up."""
    from sotto import plan
    from sotto.privacy import accounting

    made, half = plan(config), config.steps // 2
    each = accounting.epsilon(made.noise_multiplier, made.sampling_prob, half + 1, made.delta)
    shared = [f"privacy.epsilon={each!r}", f"run.steps={half}", "run.spare_steps=1"]
    head = ["method.train=head", "method.lora_layers=null", f"run.learning_rate={PROBE_RATE}"]
    path, first = trained(config.with_overrides([*shared, *head]), args)
    path, second = trained(config.with_overrides([*shared, f"model.name={path / 'model'}"]), args)
    epsilon = json.loads((path / "privacy.json").read_text())["dataset_epsilon"]
    counts = {name: first[name] + second[name] for name in ("steps", "total", "forward", "backward")}
    return {**second, **counts, "epsilon": epsilon}


def trained(config: Any, args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """One run: its folder, and what it took and gave."""
    import torch

    from sotto import commands, session

    begun = session.start(config, args.child)
    device = begun.device.type

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    meter, clock, seconds, peaks = Meter(device), [now()], [], []
    meter._reset_peak()

    def progress(step: int, values: dict[str, Any]) -> None:
        seconds.append(now() - clock[0])
        peaks.append((meter._peak() - meter.base) / 2**20)
        if args.memory and step == 3:
            print(json.dumps({"mebibytes": max(peaks)}), flush=True)
            os._exit(0)
        meter._reset_peak()
        clock[0] = now()

    run = commands.run_session(begun, progress)
    passes = config.method.passes
    cost = {
        "seconds": statistics.median(seconds[1:]),
        "total": sum(seconds),
        "steps": len(seconds),
        "mebibytes": max(peaks),
        "forward": (passes or 1) * len(seconds),
        "backward": 0 if passes else len(seconds),
    }
    return run.path, {"epsilon": run.epsilon, **cost, **commands.evaluate(run.path)}


def row(method: str, epsilon: str, rate: float | None, args: argparse.Namespace, memory: bool) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    changes = [f"privacy.epsilon={epsilon}", *([f"run.learning_rate={rate}"] if rate else []), *args.set]
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
    print(
        "| method | learning rate | epsilon | scores | MiB above the model | s/step | s | steps | forward + backward |"
    )
    print("|---|--:|--:|---|--:|--:|--:|--:|--:|", flush=True)
    for method in args.method or [m for m in METHODS if m not in ASKED_FOR]:
        peak = None
        for epsilon in args.epsilon or ["2", "8"]:
            for rate in args.rate or [rate_of(args.recipe.stem, method)]:
                found = row(method, epsilon, rate, args, False)
                if not args.once:
                    peak = peak or row(method, epsilon, rate, args, True)["mebibytes"]
                spent, seconds, total, steps, most, forward, backward = (
                    found.pop(n) for n in ("epsilon", "seconds", "total", "steps", "mebibytes", "forward", "backward")
                )
                peak = most if args.once else peak
                scores = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                spent = "none" if spent is None else f"{spent:.2f}"
                cells = (method, f"{rate:g}" if rate else "default", spent, scores, f"{peak:.0f}", f"{seconds:.2f}",
                         f"{total:.0f}", steps, f"{forward:,} + {backward:,}")  # fmt: skip
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def rate_of(recipe: str, method: str) -> float | None:
    """A learning rate for a recipe, or None for the default one."""
    rates = RATES.get(recipe, RATES["sst2"])
    return None if method.startswith("zeroth") else rates["lora" if method == "probe_lora" else method]


if __name__ == "__main__":
    main()

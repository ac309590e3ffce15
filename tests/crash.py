"""Kills whole runs at random moments, again and again, and says what was lost.

    make crash                          # 200 kills
    python tests/crash.py --kills 20

Half of the runs draw their noise from a seed, and must end at the weights of a run that nobody disturbed, bit for bit.
The other half are private, and their bill must cover every step that was begun. Central runs and simulations of
federated ones take turns. A kill is SIGKILL a few thousandths of a second after a random call that changes the disk:
a checkpoint, an entry of the ledger, the export, or any other.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import test_resume
import tiny_runs
import torch

import sotto
from sotto.federated.simulate import simulate

RUN = {"steps": 25, "checkpoint_every": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "central": {},
    "federated": {"setting": {"kind": "federated", "local_batch_size": 2}},
}
MOST = 60
"""Boundaries after which a run of this size is over."""


def undisturbed(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    folder.mkdir()
    config = tiny_runs.config(folder, run={**RUN, "debug_noise_seed": 5}, **SETTINGS[kind])
    return tiny_runs.final_weights((simulate if kind == "federated" else sotto.train)(config).path)


def disturbed(folder: Path, kind: str, kills: int, debug: bool, generator: random.Random) -> tuple[Path, int]:
    """One run that is killed up to so many times, and then left to finish. Returns its folder, and how often it was."""
    folder.mkdir()
    noise = {"debug_noise_seed": 5} if debug else {"spare_steps": 200}
    config = tiny_runs.write_yaml(folder, run={**RUN, **noise}, **SETTINGS[kind])
    begin = ("train", config) if kind == "central" else ("federated", "simulate", config)
    hits = 0
    for _ in range(kills):
        run = test_resume.found(folder)
        words = begin if run is None else ("resume", run)
        moment = {"kill_at": generator.randint(0, MOST), "delay": generator.uniform(0, 0.02)}
        process = tiny_runs.command(folder, *words, **moment)
        test_resume.killed(process)
        if process.exitcode == 0:
            break
        hits += 1
    run = test_resume.found(folder)
    if run is None:
        return (simulate if kind == "federated" else sotto.train)(config).path, hits
    return sotto.resume(run).path, hits


def judge(run: Path, debug: bool, expected: dict[str, torch.Tensor]) -> str:
    """What is wrong with a run that was killed and resumed, or ""."""
    try:
        if debug:
            tiny_runs.assert_same(expected, tiny_runs.final_weights(run))
        else:
            test_resume.check_the_bill(run)
    except AssertionError as error:
        return f"{'other weights' if debug else 'a wrong bill'}: {str(error).splitlines()[0]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator, wrong = random.Random(arguments.seed), list[str]()
    counts = {(kind, debug): [0, 0] for kind in SETTINGS for debug in (True, False)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SOTTO_LEDGER_DIR"] = str(folder / "ledger")
        expected = {kind: undisturbed(folder / f"undisturbed-{kind}", kind) for kind in SETTINGS}
        while sum(kills for _, kills in counts.values()) < arguments.kills:
            for (kind, debug), count in counts.items():
                place = folder / f"{kind}-{debug}-{count[0]}"
                try:
                    run, hits = disturbed(place, kind, 5, debug, generator)
                    fault = judge(run, debug, expected[kind])
                except Exception as error:
                    hits, fault = 0, f"lost: {type(error).__name__}: {str(error).splitlines()[0]}"
                count[0] += 1
                count[1] += hits
                if fault:
                    wrong.append(f"{kind}, run {count[0]}: {fault}")
    print("| runs | noise | finished | kills |\n|---|---|--:|--:|")
    for (kind, debug), (runs, kills) in counts.items():
        print(f"| {kind} | {'from a seed: same weights' if debug else 'private: whole bill'} | {runs} | {kills} |")
    print(f"\n{len(wrong)} runs were lost, under-counted or ended at other weights.", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

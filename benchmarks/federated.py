"""Federated rounds: what a codec keeps of an update, what it sends, what the server costs, and what a model learns.

    python benchmarks/federated.py server              # server time and memory of a round, and bytes of a message
    python benchmarks/federated.py codecs --model M --train sst2/train.tsv --eval sst2/dev.tsv
    python benchmarks/federated.py train  --model M --train sst2/train.tsv --eval sst2/dev.tsv
    python benchmarks/federated.py masks               # the same of rounds under masks, and what masks cost a user
    python benchmarks/federated.py register            # cost of a round for registers of up to a million users

`codecs` and `train` split a labelled file over synthetic users (rows are dealt out in turn) and keep its last rows as
public text for the codec `subspace`. `codecs` compares the mean of decoded, clipped updates of some users with the mean
of their updates: with and without the noise of a round. `train` runs whole private runs and scores them, beside central
training of the same model at the same epsilon. Bytes are those of the Flower message: every object that it consists of.
"""

from __future__ import annotations

import argparse
import csv
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto import session as sessions
from sotto.commands import evaluate, run_session
from sotto.config import Config
from sotto.data import PoissonSampler
from sotto.federated import unmasking
from sotto.federated.client import bounded
from sotto.federated.codec import Identity, Srht, cosine
from sotto.federated.cohort import LATENT, Cohort
from sotto.federated.masking import Party
from sotto.federated.shares import Shares
from sotto.federated.simulate import simulate
from sotto.gradients.clipping import Flat
from sotto.privacy.mechanism import GaussianMechanism
from sotto.privacy.noise import SecureNoise

PUBLIC_ROWS = 2000


def message_bytes(vector: torch.Tensor) -> int:
    """Of one user's answer, with everything that Flower puts around it."""
    from flwr.app import Message, RecordDict
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.task_identity import TaskIdentity

    from sotto.federated import messages

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    order = Message(RecordDict({}), 1, messages.TRAIN)
    reply = Message(messages.answer_content({0: vector}), reply_to=order)
    return sum(len(part.deflate()) for part in get_all_nested_objects(reply).values())


def server(size: int = 1_000_000, users: int = 100, rounds: int = 5) -> None:
    """Adding up, noising, decoding and updating, beyond what users do."""
    print(f"{users} users, {size:,} trained numbers, {torch.get_num_threads()} thread(s), median of {rounds} rounds\n")
    print("| codec | server seconds | of that decoding | memory added by the rounds | uplink bytes | share of raw |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, codec in (("none", Identity(size)), ("srht n/64", Srht(size, size // 64, "key"))):
        weights = {"w": nn.Parameter(torch.zeros(size))}
        cohort = Cohort(weights, Flat(1.0), codec, lambda order, asked: [])
        optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-3)
        mechanism = GaussianMechanism(1.0, users, SecureNoise())
        answer = bounded(codec.encode(torch.randn(size), 0), 1.0)
        as_sent = answer.numpy()
        totals, decodings = [], []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for step in range(rounds):
            begin = time.perf_counter()
            total = cohort.add_up(np.arange(users), ((user, as_sent) for user in range(users)))
            released = mechanism.privatize(total, step)[LATENT]
            middle = time.perf_counter()
            weights["w"].grad = codec.decode(released, step)
            decodings.append(time.perf_counter() - middle)
            optimizer.step()
            totals.append(time.perf_counter() - begin)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        sent = message_bytes(answer)
        print(f"| {name} | {np.median(totals):.2f} | {np.median(decodings):.2f} | {grown:.0f} MiB "
              f"| {sent:,} | 1/{4 * size / sent:.1f} |")  # fmt: skip


def register() -> None:
    """Drawing and paying for rounds of small cohorts out of large registers; a simulation, nobody is asked."""
    print("| registered users | expected in a round | seconds to draw | epsilon of 1,000 rounds at z = 1, delta 1e-8 |")
    print("|--:|--:|--:|--:|")
    from sotto.privacy import accounting

    for users in (10_000, 100_000, 1_000_000):
        sampler = PoissonSampler(users, 100 / users, bytes(16))
        begin = time.perf_counter()
        for step in range(100):
            sampler.draw(step)
        each = (time.perf_counter() - begin) / 100
        epsilon = accounting.epsilon(1.0, 100 / users, 1000, 1e-8)
        print(f"| {users:,} | 100 | {each:.4f} | {epsilon:.3f} |")


# ---- a model, and users


def tables(arguments: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Writes the users' file and the public one."""
    with open(arguments.train, encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[: arguments.rows + PUBLIC_ROWS]
    private, public = rows[:-PUBLIC_ROWS], rows[-PUBLIC_ROWS:]
    for number, row in enumerate(private):
        row["user"] = f"u{number % arguments.users}"
    found = {}
    for name, part in (("users", private), ("public", public)):
        found[name] = str(folder / f"{name}.csv")
        with open(found[name], "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(part[0]))
            writer.writeheader()
            writer.writerows(part)
    return found


def configuration(arguments: argparse.Namespace, folder: Path, files: dict[str, str], codec: str) -> Config:
    setting: dict[str, Any] = {
        "kind": "federated", "codec": codec, "local_batch_size": 8, "local_learning_rate": arguments.local_rate,
    }  # fmt: skip
    if codec != "none":
        setting["latent"] = arguments.latent
    if codec == "subspace":
        setting["public_data"] = files["public"]
    return Config.from_dict(
        {
            "model": {"name": arguments.model, "pooling": "mean"},
            "data": {"train": files["users"], "eval": arguments.eval, "text": "sentence", "label": "label",
                     "labels": ["0", "1"], "max_length": 48},
            "privacy": {"unit": "user", "num_units": arguments.users, "epsilon": arguments.epsilon, "delta": 1e-4,
                        "max_examples_per_unit": arguments.examples},
            "method": {"train": arguments.method, "clip_norm": arguments.clip, "lora_train": "up", "lora_rank": 4},
            "run": {"expected_batch_size": arguments.cohort, "steps": arguments.rounds,
                    "learning_rate": arguments.rate, "device": "cpu"},
            "output": {"dir": str(folder / f"runs-{codec}")},
            "setting": setting,
        }
    )  # fmt: skip


def codecs(arguments: argparse.Namespace) -> None:
    """What a codec keeps of a round's mean update."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = tables(arguments, folder)
        engine: Any = sessions.load_parts(configuration(arguments, folder, files, "none"), "key").engine
        users, step = np.arange(arguments.cohort), 0
        updates = torch.stack([vector for _, vector in engine.carrier(engine.order(step), users)])
        mean, clip = updates.mean(0), arguments.clip
        plan_noise = sessions.make_plan(configuration(arguments, folder, files, "none")).noise_multiplier
        norms = updates.norm(dim=1)
        print(f"{len(users)} users, {updates.shape[1]:,} trained numbers; norms {norms.median():.3f} (median), "
              f"clipped at {clip}; noise multiplier {plan_noise:.3f}\n")  # fmt: skip
        print("| codec | numbers | uplink bytes | cosine without noise | cosine with noise |")
        print("|---|--:|--:|--:|--:|")
        for codec_name in ("none", "srht", "subspace", "autoencoder"):
            codec = sessions.load_parts(configuration(arguments, folder, files, codec_name), "key").engine.codec
            latents = torch.stack([bounded(codec.encode(u, step), clip) for u in updates])
            latent = latents.mean(0)
            noisy = latent + torch.randn(codec.size) * plan_noise * clip / len(users)
            kept, left = (cosine(codec.decode(z, step), mean) for z in (latent, noisy))
            sent = message_bytes(latents[0])
            print(f"| {codec_name} | {codec.size:,} | {sent:,} | {kept:.3f} | {left:.3f} |", flush=True)


def train(arguments: argparse.Namespace) -> None:
    """Whole private runs, and central training at the same epsilon."""
    print("| setting | codec | epsilon | accuracy | held-out loss | seconds |")
    print("|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = tables(arguments, folder)
        for codec in arguments.codec or ["none", "srht", "subspace", "learned", "autoencoder"]:
            begin = time.perf_counter()
            run = simulate(configuration(arguments, folder, files, codec))
            report("federated", codec, run, time.perf_counter() - begin)
        values = configuration(arguments, folder, files, "none").to_dict()
        values.pop("setting")
        values["run"]["learning_rate"] = arguments.central_rate
        values["output"]["dir"] = str(folder / "central")
        begin = time.perf_counter()
        run = run_session(sessions.start(Config.from_dict(values), "central"), None)
        report("central", "", run, time.perf_counter() - begin)


def report(setting: str, codec: str, run: Any, seconds: float) -> None:
    scores = evaluate(run.path)
    print(f"| {setting} | {codec} | {run.epsilon:.2f} | {100 * scores['accuracy']:.1f} % | {scores['loss']:.3f} "
          f"| {seconds:.0f} |", flush=True)  # fmt: skip


def masks(size: int = 1_000_000, users: int = 100) -> None:
    """Whole rounds under masks; every user's message is the same, which no sum of masked words notices."""
    shares, message = Shares.of(1.0, 1.0, users, 0.2), torch.ones(size, dtype=torch.int32)
    print(f"{users} users, {size:,} numbers, {torch.get_num_threads()} thread(s), CPU seconds\n")
    print("| users gone after sharing | server | one user, keys and shares | one user, masks | bytes over raw |")
    print("|--:|--:|--:|--:|--:|")
    for gone in (0, 5, 10):
        round_ = unmasking.MaskedRound("benchmark", range(users), shares, size)
        parties = {user: Party(round_.label, shares.least) for user in range(users)}
        spent = {"server": 0.0, "shares": 0.0, "masks": 0.0}

        def timed(who: str, work: Callable[[], Any], spent: dict[str, float] = spent) -> Any:
            begun = time.process_time()
            result = work()
            spent[who] += time.process_time() - begun
            return result

        sent = {user: timed("shares", party.keys) for user, party in parties.items()}
        timed("server", lambda r=round_, s=sent: r.take_keys(s.items()))
        sent = {u: timed("shares", lambda p=p, r=round_: p.shares(r.roster)) for u, p in parties.items()}
        timed("server", lambda r=round_, s=sent: r.take_shares(s.items()))
        for user, party in parties.items():
            boxes = timed("server", lambda r=round_, u=user: r.boxes_for(u))
            timed("shares", lambda p=party, r=round_, b=boxes: p.admit(r.present, b))

        def messages(parties: Any = parties, gone: int = gone, word: Any = round_.word) -> Any:
            for user in range(gone, users):
                yield user, timed("masks", lambda: parties[user].mask(message, word))  # noqa: B023

        begun, before = time.process_time(), spent["masks"]
        round_.take_messages(messages())
        spent["server"] += time.process_time() - begun - (spent["masks"] - before)
        left = round_.users_at(round_.survivors)
        sent = {u: timed("shares", lambda p=parties[u], r=round_: p.reveal(r.survivors)) for u in left}
        timed("server", lambda r=round_, s=sent: r.take_reveals(s.items()))
        assert round_.total is not None
        assert torch.equal(round_.total, torch.full((size,), float(users - gone), dtype=torch.float64))
        up = sum(count for what, count in round_.moved.items() if not what.endswith("down")) / (4 * size)
        one = spent["masks"] / (users - gone)
        print(f"| {gone} | {spent['server']:.2f} | {spent['shares'] / users:.3f} | {one:.3f} "
              f"| {up / (users - gone):.4f} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["server", "masks", "codecs", "train", "register"])
    parser.add_argument("--model")
    parser.add_argument("--train")
    parser.add_argument("--eval")
    parser.add_argument("--codec", action="append")
    parser.add_argument("--rows", type=int, default=16000)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--method", default="bitfit")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--clip", type=float, default=0.3)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--central-rate", type=float, default=1e-2)
    parser.add_argument("--local-rate", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what in ("server", "masks", "register"):
        {"server": server, "masks": masks, "register": register}[arguments.what]()
    else:
        {"codecs": codecs, "train": train}[arguments.what](arguments)


if __name__ == "__main__":
    main()

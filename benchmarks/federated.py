"""Federated rounds: what a codec keeps of an update, what it sends, what the server costs, and what a model learns.

    python benchmarks/federated.py server              # server time and memory of a round, and bytes of a message
    python benchmarks/federated.py codecs --model M --train sst2/train.tsv --eval sst2/dev.tsv
    python benchmarks/federated.py train  --model M --train sst2/train.tsv --eval sst2/dev.tsv
    python benchmarks/federated.py masks               # the same of rounds under masks, and what masks cost a user
    python benchmarks/federated.py register            # cost of a round for registers of up to a million users

`codecs` and `train` split a labelled file over synthetic users (rows are dealt out in turn) and keep its last rows as
public text for the codec `subspace`; `--data shakespeare` takes speakers for users. `codecs` compares the mean of
decoded, clipped updates of some users with the mean of their updates: with and without the noise of a round. `train`
does the same, runs whole private runs and scores them, beside central training of the same model at the same epsilon.
`--variant` is a codec, `rows` of the embedding, or users who send numbers along directions: `losses`, `derivatives` or
`spry`. Bytes are those of the Flower message: every object that it consists of.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
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
from sotto.evaluation import score
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
from sotto.zeroth_order.directions import Directions

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

Rows = list[dict[str, Any]]


def sst2(arguments: argparse.Namespace) -> tuple[Rows, Rows, Rows]:
    """(the users' sentences, public ones, held-out ones): rows are dealt out to users in turn, the last are public."""
    rows, held_out = (_table(name) for name in (arguments.train, arguments.eval))
    rows = rows[: arguments.users * arguments.examples + PUBLIC_ROWS]
    for number, row in enumerate(rows[:-PUBLIC_ROWS]):
        row["user"] = f"u{number % arguments.users}"
    return rows[:-PUBLIC_ROWS], rows[-PUBLIC_ROWS:], held_out


def shakespeare(arguments: argparse.Namespace) -> tuple[Rows, Rows, Rows]:
    """The same of speakers: by the hash of the name a tenth is held out, two are public, and the others are users."""
    parts: tuple[Rows, Rows, Rows] = ([], [], [])
    with open(arguments.train, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            tenth = hashlib.sha256(row["speaker"].encode()).digest()[0] * 10 // 256
            parts[0 if tenth > 2 else 1 if tenth else 2].append(row)
    return parts


def _table(path: str) -> Rows:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def write_tables(arguments: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Files of users, of the public and of what is held out; `count` is the number of users."""
    parts = {"sst2": sst2, "shakespeare": shakespeare}[arguments.data](arguments)
    found = {"count": str(len({row[UNITS[arguments.data]] for row in parts[0]}))}
    for name, rows in zip(("users", "public", "held out"), parts, strict=True):
        found[name] = str(folder / f"{name}.jsonl")
        Path(found[name]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return found


UNITS = {"sst2": "user", "shakespeare": "speaker"}
LOOKS: dict[str, dict[str, Any]] = {
    "losses": {"zeroth_smoothing": 1e-3}, "derivatives": {"zeroth_smoothing": 0}, "spry": {"zeroth_smoothing": 0},
}  # fmt: skip
"""Users who look along public directions."""


def configuration(arguments: argparse.Namespace, folder: Path, files: dict[str, str], variant: str) -> Config:
    """One of the rows of `train`."""
    setting: dict[str, Any] = {
        "kind": "federated", "local_batch_size": arguments.local_batch, "local_learning_rate": arguments.local_rate,
    }  # fmt: skip
    if variant in ("srht", "subspace", "autoencoder", "learned"):
        setting |= {"codec": variant, "latent": arguments.latent}
    if variant == "subspace":
        setting["public_data"] = files["public"]
    data: dict[str, Any] = {"text": "speeches", "max_length": 128}
    if arguments.data == "sst2":
        data = {"text": "sentence", "label": "label", "labels": ["0", "1"], "max_length": 48}
    method = {"train": arguments.method, "clip_norm": arguments.clip, "lora_train": "up", "lora_rank": 4}
    values: dict[str, Any] = {
        "model": {"name": arguments.model, **({"pooling": "mean"} if arguments.data == "sst2" else {})},
        "data": {"train": files["users"], "eval": files["held out"], **data},
        "privacy": {"unit": UNITS[arguments.data], "num_units": int(files["count"]), "epsilon": arguments.epsilon,
                    "delta": 1e-4, "max_examples_per_unit": arguments.examples},
        "method": method,
        "run": {"expected_batch_size": arguments.cohort, "steps": arguments.rounds, "learning_rate": arguments.rate,
                "schedule": "linear", "device": "cpu"},
        "output": {"dir": str(folder / f"runs-{variant}")},
    }  # fmt: skip
    if variant == "rows":
        setting["embedding_rows"] = arguments.embedding_rows
    if variant in LOOKS:
        method |= {"gradient": "zeroth_order", "zeroth_probes": 16, "clip_norm": arguments.look_clip, **LOOKS[variant]}
        setting["parts"] = arguments.parts if variant == "spry" else 1
    if variant == "central":
        method["clip_norm"] = arguments.central_clip
        values["run"]["learning_rate"] = arguments.central_rate
    else:
        values["setting"] = setting
    return Config.from_dict(values)


def codecs(arguments: argparse.Namespace) -> None:
    """What a codec keeps of a round's mean update."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_tables(arguments, folder)
        updates = plain_updates(arguments, folder, files)
        print("| codec | numbers | uplink bytes | cosine without noise | cosine with noise |")
        print("|---|--:|--:|--:|--:|")
        for variant in arguments.variant or ["none", "srht", "subspace", "autoencoder"]:
            print(f"| {variant} | {kept(arguments, folder, files, variant, updates)} |", flush=True)


def plain_updates(arguments: argparse.Namespace, folder: Path, files: dict[str, str]) -> torch.Tensor:
    """(m, n) what the first users would change of the first round's weights, as it is before bound and codec."""
    config = configuration(arguments, folder, files, "none")
    engine: Any = sessions.load_parts(config, "key").engine
    users = np.arange(arguments.cohort)
    compute = engine.carrier.__closure__[0].cell_contents._compute
    data = engine.carrier.__closure__[0].cell_contents.data
    order = engine.order(0)
    held = type(order)(0, order.clip_norm, {n: w.clone() for n, w in order.weights.items()})
    updates = torch.stack([compute(held, data.units.members_of(np.array([user]))[0]) for user in users])
    norms = updates.norm(dim=1)
    print(f"{len(users)} users, {updates.shape[1]:,} trained numbers; norms {norms.median():.3f} (median), clipped at "
          f"{arguments.clip}; noise multiplier {sessions.make_plan(config).noise_multiplier:.3f}\n")  # fmt: skip
    return updates


def kept(
    arguments: argparse.Namespace, folder: Path, files: dict[str, str], variant: str, updates: torch.Tensor
) -> str:
    """Numbers that a user sends, their bytes, and the cosine of a round's decoded mean with the mean as it was."""
    config = configuration(arguments, folder, files, variant)
    engine: Any = sessions.load_parts(config, "key").engine
    codec, clip, mean = engine.codec, config.method.clip_norm, updates.mean(0)
    if variant in LOOKS:
        latents = torch.stack(
            [vector for _, vector in engine.carrier(engine.order(0), np.arange(len(updates)))]
        ).float()
    else:
        latents = torch.stack([bounded(codec.encode(u, 0), clip) for u in updates])
    latent, noise = latents.mean(0), sessions.make_plan(config).noise_multiplier
    noisy = latent + torch.randn(codec.size) * noise * clip / len(updates)
    decode = (lambda z: along(engine.directions, z)) if variant in LOOKS else (lambda z: codec.decode(z, 0))
    without, with_noise = (cosine(decode(z), mean) for z in (latent, noisy))
    return f"{codec.size:,} | {message_bytes(latents[0]):,} | {without:.3f} | {with_noise:.3f}"


def along(directions: Directions, numbers: torch.Tensor) -> torch.Tensor:
    """(n,) the gradient that numbers along directions stand for."""
    found = []
    for name in directions.shapes:
        own = numbers.view(directions.parts, directions.count)[directions.part[name]]
        pairs = (float(g) * directions.tensor(name, 0, k).reshape(-1) for k, g in enumerate(own))
        found.append(torch.stack(list(pairs)).sum(0))
    return torch.cat(found)


def train(arguments: argparse.Namespace) -> None:
    """Whole private runs, and central training at the same epsilon."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_tables(arguments, folder)
        print(f"{files['count']} users; trained with {arguments}\n")
        updates = plain_updates(arguments, folder, files)
        print("| training | numbers | uplink bytes | cosine without noise | with noise | epsilon | held-out loss "
              "| accuracy | CPU seconds |")  # fmt: skip
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
        print(
            f"| untrained | | | | | | {untrained(configuration(arguments, folder, files, 'central'))} | |", flush=True
        )
        for variant in arguments.variant or ["central", "none", "srht", "subspace", "autoencoder"]:
            config, begin = configuration(arguments, folder, files, variant), time.process_time()
            central = variant == "central"
            run = run_session(sessions.start(config, "central"), None) if central else simulate(config)
            spent, sent = time.process_time() - begin, " | | | "
            if not central:
                sent = kept(arguments, folder, files, variant, updates)
            print(
                f"| {variant} | {sent} | {run.epsilon:.3f} | {scores_of(evaluate(run.path))} | {spent:.0f} |",
                flush=True,
            )


def untrained(config: Config) -> str:
    """Scores of the model before the first step."""
    parts = sessions.load_parts(config, "key")
    parts.engine.detach()
    return scores_of(score(parts.model.eval(), parts.tokenizer, config))


def scores_of(scores: dict[str, Any]) -> str:
    accuracy = f"{100 * scores['accuracy']:.1f} %" if "accuracy" in scores else ""
    return f"{scores.get('loss', scores.get('nats_per_token')):.4f} | {accuracy}"


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
    parser.add_argument("--data", choices=list(UNITS), default="sst2")
    parser.add_argument("--variant", action="append", help="a row of `train` or `codecs`; repeatable")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--method", default="bitfit")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--clip", type=float, default=0.3)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--local-rate", type=float, default=0.1)
    parser.add_argument("--local-batch", type=int, default=8)
    parser.add_argument("--look-clip", type=float, default=1.0, help="bound on numbers along directions")
    parser.add_argument("--parts", type=int, default=6)
    parser.add_argument("--embedding-rows", type=int, default=128)
    parser.add_argument("--central-rate", type=float, default=1e-2)
    parser.add_argument("--central-clip", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what in ("server", "masks", "register"):
        {"server": server, "masks": masks, "register": register}[arguments.what]()
    else:
        {"codecs": codecs, "train": train}[arguments.what](arguments)


if __name__ == "__main__":
    main()

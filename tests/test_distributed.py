"""A run on several processes: the run of one process, with one draw, one noise and one ledger."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch

import sotto
from sotto import commands, distributed
from sotto import session as sessions
from sotto.checkpoint import load_latest
from sotto.config import Config
from sotto.errors import SottoError
from sotto.gradients.base import ClippedSum
from sotto.privacy.ledger import Ledger
from sotto.rundir import RunDir

DEBUG: dict[str, Any] = {"run": {"debug_noise_seed": 5, "optimizer": "adamw", "ema_decay": 0.9}}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _process(rank: int, size: int, port: int, ledger: str, output: str, work: Any, arguments: tuple[Any, ...]) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["SOTTO_LEDGER_DIR"] = ledger
    descriptor = os.open(f"{output}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    work(*arguments)


def start(folder: Path, size: int, work: Any, *arguments: Any) -> list[Any]:
    """Runs `work` in so many processes, as torchrun would. `folder/output-RANK` gets what they print."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*tiny_runs.PRELOADED, "torch.distributed"])
    common = (size, free_port(), os.environ["SOTTO_LEDGER_DIR"], str(folder / "output"), work, arguments)
    processes = [context.Process(target=_process, args=(rank, *common)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[Any], seconds: float = 240) -> list[int | None]:
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def train(path: Path) -> None:
    sotto.train(path)


def resume(path: Path) -> None:
    sotto.resume(path)


# ---- several processes as threads of this one, so that a fault planted here is planted in all of them


class Threads(distributed.Group):
    """A group whose processes are threads: each operation is what the library's would do, through shared memory."""

    def __init__(self, rank: int, size: int, met: threading.Barrier, shared: list[torch.Tensor | None]):
        super().__init__(torch.device("cpu"), rank, size)
        self._met, self._shared = met, shared

    @classmethod
    def several(cls, size: int) -> list[Threads]:
        met, shared = threading.Barrier(size, timeout=120), [None] * size
        return [cls(rank, size, met, shared) for rank in range(size)]

    def _all(self, held: torch.Tensor) -> list[torch.Tensor]:
        self._shared[self.rank] = held.clone()
        self._met.wait()
        found = [t for t in self._shared if t is not None]
        self._met.wait()
        return found

    def _broadcast(self, held: torch.Tensor) -> None:
        held.copy_(self._all(held)[0])

    def _reduce(self, held: torch.Tensor) -> None:
        total = torch.stack(self._all(held)).sum(0)
        if self.rank == 0:
            held.copy_(total)

    def _all_reduce(self, held: torch.Tensor) -> None:
        held.copy_(torch.stack(self._all(held)).sum(0))

    def leave(self) -> None:
        """Nothing is held."""


def in_threads(size: int, config: Config) -> Path:
    """A whole run, its leader in this thread."""
    leader, *others = Threads.several(size)
    found: list[Any] = []

    def one(group: Threads) -> None:
        try:
            found.append(distributed.follow(config, group))
        except BaseException as error:
            found.append(error)
            group._met.abort()

    loading, load = threading.Lock(), sessions.load_parts

    def load_parts(*arguments: Any) -> Any:
        """One at a time: while transformers reads a model it changes its classes for the whole process."""
        with loading:
            return load(*arguments)

    threads = [threading.Thread(target=one, args=(group,)) for group in others]
    patch = pytest.MonkeyPatch()
    patch.setattr(sessions, "load_parts", load_parts)
    for thread in threads:
        thread.start()
    try:
        run = commands.run_session(sessions.start(config, "run", group=leader), None)
    except threading.BrokenBarrierError:
        pass
    finally:
        leader._met.abort()
        for thread in threads:
            thread.join(60)
        patch.undo()
    for error in found:
        if isinstance(error, BaseException):
            raise error
    for follower in found:
        assert follower.path == run.path
        assert follower.steps == run.steps
    return run.path


@pytest.mark.parametrize(
    "changes",
    [
        DEBUG,
        tiny_runs.merge(DEBUG, {"method": {"clipping": "adaptive"}}),
        tiny_runs.merge(DEBUG, {"method": {"gradient": "zeroth_order", "train": "bitfit", "zeroth_probes": 3}}),
        {"privacy": {"epsilon": "none"}, "run": {"steps": 2}},
    ],
    ids=["weights", "adaptive", "zeroth order", "without privacy"],
)
def test_several_processes_make_the_weights_of_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    alone = sotto.train(tiny_runs.config(tmp_path, **changes)).path
    both = in_threads(3, tiny_runs.config(tmp_path, **changes))
    if changes.get("privacy"):
        return  # batches differ from run to run; that it ends is what there is to see
    tiny_runs.assert_same(tiny_runs.final_weights(alone), tiny_runs.final_weights(both), tolerance=2e-5)
    first, second = (
        [json.loads(line) for line in (path / "metrics.private.jsonl").read_text().splitlines()]
        for path in (alone, both)
    )
    assert [s["units"] for s in second] == [s["units"] for s in first]
    assert [s["median_norm"] for s in second] == pytest.approx([s["median_norm"] for s in first], rel=1e-3)


def test_public_text_ends_a_run_everywhere_at_the_same_step(tmp_path: Path) -> None:
    public = tiny_runs.write_csv(tmp_path / "public.csv", tiny_runs.rows(20, seed=9))
    rule = {"steps": 30, "patience": 2, "look_every": 1, "learning_rate": 0.1}
    changes = tiny_runs.merge(DEBUG, {"run": rule, "data": {"public": str(public)}})
    alone = sotto.train(tiny_runs.config(tmp_path, **changes))
    both = RunDir.open(in_threads(3, tiny_runs.config(tmp_path, **changes)))
    assert both.read_json("privacy.json")["steps"] == alone.steps < 30
    tiny_runs.assert_same(tiny_runs.final_weights(alone.path), tiny_runs.final_weights(both.path), tolerance=2e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_noise_of_an_update_does_not_depend_on_the_number_of_processes(tmp_path: Path, size: int) -> None:
    """After one SGD step of rate 1 what has moved the weights is noise: a unit may move a coordinate by far less."""
    changes: dict[str, Any] = {"run": {"steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "schedule": "constant"},
                               "method": {"clip_norm": 1e-3}, "output": {"export": "none"}}  # fmt: skip
    config = tiny_runs.config(tmp_path, **changes)
    run = RunDir.open(sotto.train(config).path if size == 1 else in_threads(size, config))
    state, _ = load_latest(run.checkpoints)
    assert state is not None
    before = dict(sessions.load_parts(run.config(), "00").model.named_parameters())
    moved = torch.cat([(value - before[name].detach()).flatten().double() for name, value in state.weights.items()])
    plan = run.plan()
    expected = plan.noise_multiplier * plan.clip_norm / plan.expected_batch_size
    assert float(moved.std()) == pytest.approx(expected, rel=0.05)
    for wrong in ({size**0.5, size, size**-0.5} - {1.0}) if size > 1 else ():  # noise of each, added up or shared out
        assert float(moved.std() * wrong) != pytest.approx(expected, rel=0.05)


def test_other_data_at_a_follower_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_runs.config(tmp_path)
    other = tiny_runs.write_csv(tmp_path / "other.csv", tiny_runs.rows(seed=4))
    elsewhere = config.model_copy(update={"data": config.data.model_copy(update={"train": str(other)})})
    follow = distributed.follow
    monkeypatch.setattr(distributed, "follow", lambda _, group: follow(elsewhere, group))
    with pytest.raises(SottoError, match="SOT519"):
        in_threads(2, config)


# ---- real processes


def test_a_private_run_is_charged_once_and_stated_once(tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    assert wait(start(tmp_path, 2, train, config)) == [0, 0], (tmp_path / "output-0").read_text()[-2000:]
    run = RunDir.open(tiny_runs.only_run(tmp_path))
    facts, secret = run.read_json("privacy.json"), run.read_json("private/secrets.json")
    assert facts["steps_charged"] == facts["steps"] == 4
    assert Ledger.open(secret["ledger"]).reserved(run.id) == 4
    assert "who" in run.read("statement.txt")


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    alone = sotto.train(tiny_runs.config(tmp_path, **DEBUG))
    (tmp_path / "both").mkdir()
    path = tiny_runs.write_yaml(tmp_path / "both", **tiny_runs.merge(DEBUG, {"run": {"steps": 4}}))
    processes = start(tmp_path / "both", 2, train_two_steps, path)
    assert wait(processes)[1] != 0  # the leader was killed, so the other one has nobody to follow
    run = tiny_runs.only_run(tmp_path / "both")
    assert tiny_runs.steps_done(run) == 2
    assert wait(start(tmp_path / "both", 3, resume, run)) == [0, 0, 0], (tmp_path / "both" / "output-0").read_text()
    tiny_runs.assert_same(tiny_runs.final_weights(alone.path), tiny_runs.final_weights(run), tolerance=2e-5)


def train_two_steps(path: Path) -> None:
    """The leader kills itself when two steps are saved."""
    from sotto import training

    save = training.save_checkpoint

    def saving(session: Any) -> None:
        save(session)
        if session.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    training.save_checkpoint = saving
    sotto.train(path)


@pytest.mark.parametrize("changes", [{"method": {"train": "side", "side_cache": True}}])
def test_what_cannot_be_split_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(SottoError, match="SOT518"):
        distributed.require_possible(tiny_runs.config(tmp_path, **changes))
    distributed.require_possible(tiny_runs.config(tmp_path))


def test_shares_are_all_units_and_none_twice() -> None:
    units = np.arange(3, 40, dtype=np.int64)
    for size in (1, 2, 5, 64):
        shares = [distributed.Group(torch.device("cpu"), rank, size).share(units) for rank in range(size)]
        assert sorted(np.concatenate(shares).tolist()) == units.tolist()


def add_up(folder: Path) -> None:
    """Sums of known numbers, with no units, and with norms that are not finite."""
    from torch import distributed as dist

    dist.init_process_group("gloo")
    group = distributed.Group(torch.device("cpu"))
    norms = torch.tensor([[1.0], [float("nan")], [float("inf")]][: 3 * (group.rank == 1)], dtype=torch.float64)
    total = ClippedSum({"w": torch.full((2,), float(10**group.rank))}, norms.reshape(-1, 1), 1.0)
    total = group.add(total)
    state = group.spread_all(
        {"a": torch.arange(3), "b": torch.tensor(2.5, dtype=torch.float64)} if not group.rank else {}
    )
    found = {"w": total.gradients["w"].tolist(), "norms": [str(x) for x in total.group_norms.flatten().tolist()],
             "state": {n: (str(t.dtype), t.tolist()) for n, t in state.items()}}  # fmt: skip
    (folder / f"found-{group.rank}").write_text(json.dumps(found))
    group.leave()


def test_sums_norms_and_states_travel_as_they_are(tmp_path: Path) -> None:
    assert wait(start(tmp_path, 3, add_up, tmp_path)) == [0, 0, 0], (tmp_path / "output-0").read_text()
    found = [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(3)]
    assert found[0]["w"] == [111.0, 111.0]
    assert found[0]["norms"] == ["1.0", "nan", "inf"]
    assert all(f["state"] == {"a": ["torch.int64", [0, 1, 2]], "b": ["torch.float64", 2.5]} for f in found)


def test_one_process_is_no_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not distributed.several()
    assert distributed.lead(tiny_runs.config(tmp_path)) is None
    session = sessions.start(tiny_runs.config(tmp_path), "run")
    assert session.followers is None
    assert dataclasses.is_dataclass(session)
    session.engine.detach()
    session.held.close()

"""One run on several processes: `torchrun --nproc-per-node 2 -m sotto.cli train clinic.yaml`.

Every process has the model and reads the data. In each step the first one, the leader, pays, draws, and tells the
others which units were drawn; each sums the clipped gradients of its share of them; the sums are added up at the
leader, which adds the noise, once, and sends the noised update to all. So the mechanism is that of one process: a unit
is clipped whole in one place, there is one draw, one noise and one ledger, and what the followers know before the noise
stays between these processes. Only the leader writes.

With several processes the sums differ in their last bits from those of one, because additions have another order. How
many there are may change when a run is resumed. Messages are tensors: nothing is unpickled.

Not covered: a model that does not fit one process, runs whose text is elsewhere, and stored outputs of a side network.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

from sotto import begun
from sotto.config import Config
from sotto.devices import device_of, several
from sotto.errors import SottoError
from sotto.gradients.base import ClippedSum
from sotto.gradients.clipping import Adaptive, Clipping
from sotto.settled import digest

if TYPE_CHECKING:
    from sotto.session import Loaded
    from sotto.training import Session

DONE = -1
"""The step that says that there is none."""


def follows() -> bool:
    """Whether this process is not the first of several."""
    return several() and int(os.environ.get("RANK", "0")) > 0


def lead(config: Config) -> Group | None:
    """As the first process of a run, meets the others. None if there are none."""
    return Group.join(config) if several() else None


def require_possible(config: Config) -> None:
    """Refuses what several processes cannot do. Raises SOT518."""
    reason = None
    if config.setting.kind != "central":
        reason = "setting.kind", "its users, or sites, are the ones that compute"
    elif config.method.side_cache:
        reason = "method.side_cache", "the stored outputs belong to one process"
    if reason is not None:
        raise SottoError(
            "SOT518", what="this run cannot be split over several processes", where=reason[0], why=reason[1],
            fix="start it without torchrun, or change that key",
        )  # fmt: skip


@dataclass
class Group:
    """The processes of a run. Tensors travel on `device`, as gloo (CPU) and nccl (CUDA) want them."""

    device: torch.device
    rank: int = field(default_factory=lambda: dist.get_rank())
    size: int = field(default_factory=lambda: dist.get_world_size())

    @classmethod
    def join(cls, config: Config) -> Group:
        """Meets the other processes; torchrun says where.

        Raises:
          SottoError: SOT518, this run cannot be split; SOT506, there is no device for this process.
        """
        require_possible(config)
        device = device_of(config)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(device)

    def leave(self) -> None:
        dist.destroy_process_group()

    # ---- what is asked of the library, each of them of all processes in the same order

    def _broadcast(self, held: torch.Tensor) -> None:
        dist.broadcast(held, src=0)

    def _reduce(self, held: torch.Tensor) -> None:
        dist.reduce(held, dst=0)

    def _all_reduce(self, held: torch.Tensor) -> None:
        dist.all_reduce(held)

    # ---- what a run needs

    def tell(self, facts: dict[str, Any] | None) -> dict[str, Any]:
        """The leader's facts, as JSON, at every process."""
        text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8).copy()
        length = self.spread(torch.tensor([len(text)]))
        body = torch.from_numpy(text) if self.rank == 0 else torch.empty(int(length), dtype=torch.uint8)
        return json.loads(bytes(self.spread(body).cpu().numpy()))

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """The leader's tensor at every process; the others pass one of its shape and type."""
        held = value.detach().to(self.device).contiguous()
        self._broadcast(held)
        return held

    def spread_all(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The leader's tensors, whatever they are called and look like, at every process."""
        mine = {n: (str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in tensors.items()}
        theirs = self.tell(mine if self.rank == 0 else None)
        return {
            name: self.spread(tensors[name] if self.rank == 0 else torch.empty(shape, dtype=getattr(torch, dtype)))
            for name, (dtype, shape) in theirs.items()
        }

    def share(self, units: np.ndarray) -> np.ndarray:
        """This process's part of the drawn units: every unit is in exactly one."""
        return units[self.rank :: self.size]

    def add(self, total: ClippedSum) -> ClippedSum:
        """At the leader, the sum over all processes; elsewhere a sum that is used up."""
        for value in total.gradients.values():
            held = value if value.device == self.device else value.to(self.device)
            self._reduce(held)
            if held is not value:
                value.copy_(held)
        total.group_norms = self._gather(total.group_norms)
        return total

    def _gather(self, norms_UG: torch.Tensor) -> torch.Tensor:
        """The rows of all processes at every one of them: how many there are differs, so they travel padded."""
        counts = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        counts[self.rank] = len(norms_UG)
        self._all_reduce(counts)
        padded = torch.zeros(self.size, int(counts.max()), norms_UG.shape[1], dtype=torch.float64, device=self.device)
        padded[self.rank, : len(norms_UG)] = norms_UG.to(self.device)
        self._all_reduce(padded)  # with zeros, so that rows which are not finite stay what they are
        return torch.cat([padded[r, : int(count)] for r, count in enumerate(counts)])

    def agree_on(self, clipping: Clipping) -> None:
        """Takes over the leader's thresholds, where they move."""
        if isinstance(clipping, Adaptive):
            clipping.thresholds = self.tell({"thresholds": clipping.thresholds} if self.rank == 0 else None)[
                "thresholds"
            ]


@dataclass(frozen=True)
class Followed:
    """What a follower has in the end: the leader's run folder, the model without any averaging, and the steps."""

    path: Path
    model: nn.Module
    steps: int


class Followers:
    """The other processes, as the leader's loop sees them."""

    def __init__(self, group: Group):
        self.group = group

    def greet(self, session: Session, directions_key: str, data: str) -> None:
        """Tells the followers what to compute, and where the run stands.

        Args:
          directions_key: of the run's public directions.
          data: what `session` makes of the data, to be compared.
        """
        where = str(session.run.path)
        self.group.tell({"directions": directions_key, "data": data, "step": session.step, "run": where})
        self.group.spread_all(session.optimizer.stored_weights())
        self.group.spread_all(session.optimizer.state_tensors())
        self.group.agree_on(session.engine.clipping)

    def order(self, step: int, units: np.ndarray) -> np.ndarray:
        """Announces a step that is paid for. Returns the leader's own share of the units."""
        self.group.spread(torch.tensor([step, len(units)]))
        self.group.spread(torch.from_numpy(units))
        return self.group.share(units)

    def gather(self, total: ClippedSum) -> ClippedSum:
        return self.group.add(total)

    def update(self, update: dict[str, torch.Tensor], clipping: Clipping) -> None:
        """Sends what was released."""
        for value in update.values():
            self.group.spread(value)
        self.group.agree_on(clipping)

    def dismiss(self) -> None:
        """Ends the followers' loops."""
        self.group.spread(torch.tensor([DONE, 0]))
        self.group.leave()


def follow(config: Config, group: Group | None = None) -> Followed:
    """The life of a process that is not the first: sums what it is told to, and keeps its weights in step.

    Args:
      group: the processes; default: those that torchrun started.

    Raises:
      SottoError: as for training; SOT519, this process reads other data than the leader.
    """
    from sotto import session as sessions

    group = group or Group.join(config)
    begun.note(None)  # by the first process
    facts = group.tell(None)
    parts = sessions.load_parts(config, facts["directions"])
    if digest(parts.data) != facts["data"]:
        raise SottoError(
            "SOT519", what=f"process {group.rank} does not read the data that the first one reads",
            where=config.data.train, why="a unit's number must mean the same person everywhere",
            fix="give all processes the same files",
        )  # fmt: skip
    optimizer = sessions.make_optimizer(parts.engine, config)
    optimizer.restore(group.spread_all({}), group.spread_all({}))
    group.agree_on(parts.engine.clipping)
    steps = facts["step"]
    while (done := _one_step(group, parts, optimizer)) is not None:
        steps = done
    group.leave()
    parts.engine.detach()
    return Followed(Path(facts["run"]), parts.model.eval(), steps)


def _one_step(group: Group, parts: Loaded, optimizer: Any) -> int | None:
    """One step as a follower. Returns how many steps the run has taken then, or None when there is none left."""
    from sotto import dropout, training

    step, count = group.spread(torch.zeros(2, dtype=torch.int64)).tolist()
    if step == DONE:
        return None
    units = group.share(group.spread(torch.zeros(count, dtype=torch.int64)).cpu().numpy())
    with dropout.masks(parts.config, parts.device, step, group.rank):
        total = training.clipped_sum(parts, units, step)
    if parts.engine.arrangement != parts.engine.verified and len(units):
        training.check_gradients_of(parts, units[: training.CHECKED_UNITS])
    like = {
        n: torch.empty_like(g, dtype=torch.promote_types(g.dtype, torch.float32)) for n, g in total.gradients.items()
    }
    group.add(total)
    del total
    optimizer.step({name: group.spread(value) for name, value in like.items()}, step)
    group.agree_on(parts.engine.clipping)
    return step + 1

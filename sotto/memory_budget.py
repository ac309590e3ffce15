"""Keeps a run within its memory: which microbatch fits, which methods would, and what to say when none does.

The microbatch is performance alone. It never changes the batch that is drawn, the noise or epsilon.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, get_args

import psutil
import torch

from sotto import memory_estimate
from sotto.config import Config, MethodSection
from sotto.errors import SottoError
from sotto.memory_forecast import MemoryForecast, MemoryLaw
from sotto.models.source import ModelFacts, inspect, resolve

MIB, GIB = 2**20, 2**30
LARGEST_MICROBATCH = 64
"""More examples at a time are hardly faster."""
RESERVE = 0.9
"""The part of the memory that is planned with. The rest is for what allocators and libraries keep."""
THRIFTY = ("lora", "reversible", "bitfit", "side", "head")
"""What is proposed in the place of a method that does not fit, the nearest first."""
PATIENCE = 20.0
"""Seconds that a table may take in one process; starting others takes some of its own."""


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may use.

    Attributes:
      total: `run.memory`, or what is free.
      room: what is left of it for tensors: nine tenths, less what this process uses already for Python, libraries and
        code, where `run.memory` has to hold that as well.
      given: whether it was set, so that it is kept.
    """

    total: int
    room: int
    given: bool

    @classmethod
    def of(cls, config: Config, device: torch.device) -> Budget:
        given = config.run.memory_bytes
        if given is None:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_estimate.free_memory()
            return cls(free, round(RESERVE * free), False)
        used = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
        return cls(given, round(RESERVE * given) - used, True)


@dataclass(frozen=True)
class MethodRow:
    """One method of the table: its forecast, and the largest microbatch that fits; or why it cannot be used."""

    train: str
    gradient: str
    forecast: MemoryForecast | None
    largest: int
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"train": self.train, "gradient": self.gradient, "largest_microbatch": self.largest,
                "refused": self.refused or None, "forecast": self.forecast and self.forecast.to_dict()}  # fmt: skip


@dataclass(frozen=True)
class MemoryTable:
    """What `sotto memory` knows.

    Attributes:
      rows: every method that the configuration has words for.
      pick: the recipe's own method if it fits, else the nearest that does; None if none does.
      microbatch_size: what the forecasts are for.
    """

    rows: list[MethodRow]
    pick: MethodRow | None
    budget: Budget
    microbatch_size: int

    def to_dict(self) -> dict[str, Any]:
        pick = self.pick and {"train": self.pick.train, "gradient": self.pick.gradient,
                              "microbatch_size": min(self.pick.largest, LARGEST_MICROBATCH)}  # fmt: skip
        return {"budget": self.budget.total, "room": self.budget.room, "microbatch_size": self.microbatch_size,
                "pick": pick, "rows": [row.to_dict() for row in self.rows]}  # fmt: skip


def choose(config: Config, device: torch.device, facts: ModelFacts | None = None) -> tuple[MemoryForecast, Budget]:
    """The forecast of a run and its microbatch: the one that is set, or the largest that fits.

    Raises:
      SottoError: SOT515, `run.memory` is below what the method needs at least; SOT300 to SOT345, there is no such model
        or it cannot be trained in that way.
    """
    budget, law = Budget.of(config, device), MemoryLaw(config, device, facts)
    size = config.run.microbatch_size
    if size == "auto":
        size = law.largest(budget.room, LARGEST_MICROBATCH)
    forecast = law.at(max(1, size))
    if budget.given and forecast.peak > budget.room:
        raise _too_small(config, device, law, budget, forecast)
    return forecast, budget


def microbatch_size(config: Config, device: torch.device) -> int:
    """The microbatch of a run, before any weight is read. Only a budget that is set costs a forecast.

    Raises:
      SottoError: as `choose`.
    """
    if config.run.memory is not None:
        return choose(config, device)[0].microbatch_size
    if isinstance(config.run.microbatch_size, int):
        return config.run.microbatch_size
    facts = inspect(resolve(config.model.name, config.model.revision))
    return memory_estimate.estimate(facts, config, Budget.of(config, device).total).microbatch_size


def table(
    config: Config,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, of: None,
    workers: int = 1,
) -> MemoryTable:
    """Forecasts of all methods at the recipe's microbatch, or at the one that fits the recipe's own method.

    Args:
      progress: called with the number of methods that are done, and of all; each takes some seconds.
      workers: processes that share the work where one would take longer than `PATIENCE`. Each needs the memory of
        the libraries, and imports the main module, which must be guarded by its name then.
    """
    budget, size = Budget.of(config, device), config.run.microbatch_size
    own = _gradient(config.method.gradient)
    if size == "auto":
        size = max(1, MemoryLaw(config, device).largest(budget.room, LARGEST_MICROBATCH))
    gradients = [g for g in get_args(MethodSection.model_fields["gradient"].annotation) if g != "auto"]
    trains = [t for t in get_args(MethodSection.model_fields["train"].annotation) if t != "head"]
    jobs = [(config, device, train, gradient, size, budget) for train in trains for gradient in gradients]
    rows: list[MethodRow] = []
    progress(0, len(jobs))
    for row in _rows(jobs, workers):
        rows.append(row)
        progress(len(rows), len(jobs))
    fitting = {(row.train, row.gradient): row for row in rows if row.largest >= 1}
    wanted = [(config.method.train, own), *((config.method.train, g) for g in gradients if g != "per_example")]
    wanted += [(train, own) for train in THRIFTY]
    return MemoryTable(rows, next((fitting[key] for key in wanted if key in fitting), None), budget, size)


def _gradient(name: str) -> str:
    return "book_keeping" if name == "auto" else name


def _rows(jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[MethodRow]:
    """`_row` of every job, in order; in other processes once the first has shown how long all would take."""
    begun = time.monotonic()
    yield _row(*jobs[0])
    done, left = 1, len(jobs) - 1
    workers = min(workers, left)
    if workers > 1 and (time.monotonic() - begun) * left > PATIENCE:
        quiet = (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is told to all of them: one alone has something to say
        with ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, quiet) as pool:
            try:
                for row in pool.map(_row, *zip(*jobs[1:], strict=True)):
                    yield row
                    done += 1
            except BrokenProcessPool:  # a process was ended from outside, for its memory perhaps: go on alone
                pass
    for job in jobs[done:]:
        yield _row(*job)


def _row(config: Config, device: torch.device, train: str, gradient: str, size: int, budget: Budget) -> MethodRow:
    try:
        law = MemoryLaw(_changed(config, train, gradient), device)
        return MethodRow(train, gradient, law.at(size), law.largest(budget.room, 16 * LARGEST_MICROBATCH))
    except SottoError as error:
        return MethodRow(train, gradient, None, 0, f"{error.code}: {error.what}")


def _changed(config: Config, train: str, gradient: str) -> Config:
    # An adapter can be exported of LoRA alone, and a cache is for side networks; neither matters here.
    free = ["output.export=merged", "method.side_cache=false"]
    return config.with_overrides([f"method.train={train}", f"method.gradient={gradient}", *free])


def _too_small(
    config: Config, device: torch.device, law: MemoryLaw, budget: Budget, forecast: MemoryForecast
) -> SottoError:
    """Says the floor, and what would be below it: a smaller microbatch, or another method."""
    floor = law.at(1)
    used = round(RESERVE * budget.total) - budget.room
    needed = (floor.peak + used) / RESERVE
    reach = [f"run.memory: {-(-needed // MIB):.0f}MiB"]
    if floor.peak <= budget.room:
        reach = [f"run.microbatch_size: {law.largest(budget.room, forecast.microbatch_size)}", "run.memory: more"]
    for train in (t for t in THRIFTY if t != config.method.train):
        row = _row(config, device, train, forecast.gradient, 1, budget)
        if row.forecast is not None and row.forecast.peak <= budget.room:
            reach.append(f"method.train: {train} ({_mib(row.forecast.peak)} of tensors)")
    libraries = f", beside {_mib(used)} of Python and libraries" if used else ""
    return SottoError(
        "SOT515",
        what=f"the run would need {_mib(forecast.peak)} for tensors with {forecast.microbatch_size} examples at a "
        f"time, and at least {_mib(floor.peak)} with one{libraries}",
        where=f"run.memory: {config.run.memory}",
        why="a tenth is kept for what allocators and libraries hold, "
        f"so {_mib(max(0, budget.room))} are left for tensors",
        fix="; or ".join([*reach, "a smaller data.max_length"]),
    )


def _mib(size: float) -> str:
    return f"{size / MIB:,.0f} MiB" if size < 10 * GIB else f"{size / GIB:,.1f} GiB"

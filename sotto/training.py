"""The loop. One step: reserve, draw, sum, noise, update.

`ledger.reserve` comes first: the spend is on disk before any data is touched, so a crash can only over-count. After
`privatize` everything is post-processing.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sotto import checkpoint, dropout
from sotto.activations import instead_of_layers
from sotto.config import Config
from sotto.data import LoadedData, PoissonSampler, microbatches
from sotto.distributed import Followers
from sotto.errors import SottoError
from sotto.federated.cohort import Cohort
from sotto.federated.server import Decoding
from sotto.gradients.base import ClippedSum
from sotto.gradients.clipping import Adaptive
from sotto.gradients.engine import Engine
from sotto.gradients.self_check import verify
from sotto.losses import autocast, forward_losses, to_device
from sotto.metrics import Metrics
from sotto.models.activation_cache import ActivationCache
from sotto.optim import Optimizer, learning_rate
from sotto.privacy.plan import Plan
from sotto.rundir import RunDir
from sotto.stopping import StopRule
from sotto.zeroth_order.engine import ZerothOrder
from sotto.zeroth_order.updates import Updates

CHECKED_UNITS = 3
CHECKED_EXAMPLES = 12
BFLOAT16_TOLERANCE = 5e-2
"""A bfloat16 has 8 bits: the same text alone and in a padded batch differs by about a hundredth."""


class Mechanism(Protocol):
    def privatize(self, total: ClippedSum, step: int) -> dict[str, torch.Tensor]: ...


class Budget(Protocol):
    """Where steps are paid for."""

    def reserve(self, step: int) -> int | None:
        """Pays for a step. Returns how often it was paid for before, or None when nothing is left to pay with."""
        ...


Planted = Callable[[torch.Tensor, np.ndarray], torch.Tensor]
"""What an audit makes of the (B,) losses of these examples, so that its canaries have the gradients that it wants."""


class Holder(Protocol):
    """What is needed to sum over units: whoever has a model and text."""

    config: Config
    model: nn.Module
    tokenizer: Any
    engine: Engine | ZerothOrder | Cohort
    data: LoadedData
    device: torch.device
    microbatch_size: int
    activations: ActivationCache | None
    planted: Planted | None


@dataclass
class Session:
    """Everything that a run needs, built once by `sotto.session`."""

    config: Config
    plan: Plan
    run: RunDir
    model: nn.Module
    tokenizer: Any
    engine: Engine | ZerothOrder | Cohort
    data: LoadedData
    sampler: PoissonSampler
    mechanism: Mechanism
    budget: Budget
    optimizer: Optimizer | Updates | Decoding
    device: torch.device
    microbatch_size: int
    checkpoint_every: int
    step: int = 0
    progress: Callable[[int, dict[str, Any]], None] = lambda step, values: None
    stop_requested: bool = False
    notes: list[str] = field(default_factory=list)
    activations: ActivationCache | None = None
    """What a frozen model gave for each example, with `method.side_cache`."""
    followers: Followers | None = None
    """The other processes that compute this run."""
    planted: Planted | None = None
    rule: StopRule | None = None
    """What may end the run before its last planned step."""
    held: ExitStack = field(default_factory=ExitStack)
    """The lock on the run folder, from before the first file is read until the run ends."""

    @property
    def done(self) -> bool:
        """Whether there is no step left to take."""
        return self.step >= self.plan.steps or (self.rule is not None and self.rule.met)


def train_loop(session: Session, metrics: Metrics) -> bool:
    """Runs from `session.step` to the end. Returns False if it was stopped by a signal and can be resumed."""
    s = session
    while not s.done:
        step = s.step
        units = begin_step(s, step)
        if units is None:
            break
        total = _sum_of_all(s, units, step)
        if s.engine.arrangement != s.engine.verified:  # some module has gone over to another rule
            check_gradients(s)
        finish_step(s, step, units, total, metrics)
        if s.stop_requested and not s.done:
            return False
    if s.rule is not None and s.rule.met and s.step < s.plan.steps:
        s.notes.append(f"ended after {s.step} of {s.plan.steps} steps: {s.rule.reason}")
    return True


def _sum_of_all(s: Session, units: np.ndarray, step: int) -> ClippedSum:
    """The clipped sum of the drawn units, by all processes of the run."""
    mine = units if s.followers is None else s.followers.order(step, units)
    with dropout.masks(s.config, s.device, step):
        total = clipped_sum(s, mine, step)
    return total if s.followers is None else s.followers.gather(total)


def begin_step(session: Session, step: int) -> np.ndarray | None:
    """Pays for a step and draws its units. Returns None when nothing is left to pay with."""
    s = session
    attempt = s.budget.reserve(step)  # write-ahead: the spend is on disk before data is touched
    if attempt is None:
        s.notes.append(f"stopped after {step} of {s.plan.steps} steps: the next one would have passed the budget")
        save_checkpoint(s)
        return None
    return s.sampler.draw(step, attempt)  # Poisson; may be empty, and then still noises


def finish_step(session: Session, step: int, units: np.ndarray, total: ClippedSum, metrics: Metrics) -> None:
    """Noises a step's sum, which is emptied, updates the weights, and saves what is due."""
    s = session
    private = private_numbers(s, total, units)
    update = s.mechanism.privatize(total, step)  # from here on everything is post-processing
    sensitivity = total.sensitivity
    total.gradients.clear()  # the optimizer and the next batch need the room
    if s.followers is not None:
        s.followers.update(update, s.engine.clipping)
    s.optimizer.step(update, step)
    s.step = step + 1
    public = public_numbers(s, step, sensitivity)
    if s.rule is not None:
        public |= s.rule.look(s)
    (public if s.plan.private else private)["update_norm"] = norm_of(update)  # public only after noise
    del update
    metrics.log(s.step, public, private)
    s.progress(s.step, {**public, **private})
    if s.stop_requested or s.step % s.checkpoint_every == 0 or s.done:
        save_checkpoint(s)


def clipped_sum(session: Holder, units: np.ndarray, step: int) -> ClippedSum:
    """The sum over the drawn units of their clipped gradients, in microbatches that never split a unit.

    Out of memory halves the microbatch and starts the same logical batch again; nothing has been released by then.
    """
    s = session
    while True:
        try:
            return _clipped_sum(s, units, step)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if s.microbatch_size == 1:
                raise _does_not_fit(s) from None
            s.microbatch_size = max(1, s.microbatch_size // 2)
        # Only here, after the exception and the tensors that its frames hold are gone, is there something to free.
        if s.device.type == "cuda":
            torch.cuda.empty_cache()


def _clipped_sum(s: Holder, units: np.ndarray, step: int) -> ClippedSum:
    if isinstance(s.engine, Cohort):
        return s.engine.collect(units, step)
    total = s.engine.zeros()
    if len(units) == 0:
        return total
    examples, unit_of = s.data.units.members_of(units)
    for rows in microbatches(examples, unit_of, s.data.examples.lengths, s.microbatch_size):
        units_B = torch.from_numpy(unit_of[rows]).to(s.device)
        if isinstance(s.engine, ZerothOrder):
            total += s.engine.clipped_sum(batch_of(s, examples[rows]), units_B, step)
        else:
            total += s.engine.backward(losses_of(s, examples[rows]), units_B)
    return total


def batch_of(s: Holder, examples: np.ndarray) -> dict[str, Any]:
    return to_device(s.data.examples.collate(examples, s.tokenizer.pad_token_id), s.device)


def losses_of(s: Holder, examples: np.ndarray) -> torch.Tensor:
    """(B,) losses of these examples, with their graph."""
    batch = batch_of(s, examples)
    with autocast(s.config, s.device), instead_of_layers(s, examples):
        losses_B = forward_losses(s.model, batch, s.config.data.task)
    return losses_B if s.planted is None else s.planted(losses_B, examples)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) or "not enough memory" in str(error)


def _does_not_fit(s: Holder) -> SottoError:
    return SottoError(
        "SOT513", what="out of memory with one example at a time", where=f"run.microbatch_size; {s.device}",
        why="the examples of one unit must be in memory together; the last checkpoint is untouched, and steps that "
        "were begun stay charged",
        fix="lower data.max_length or privacy.max_examples_per_unit, or use method.train: lora, in a new run",
    )  # fmt: skip


def check_gradients(session: Session) -> None:
    """Compares the engine with plain autograd on a few units: before anything is written, and when its rules change."""
    s = session
    if len(s.data.units) == 0 or isinstance(s.engine, Cohort):  # whose devices train as they like
        return
    units = s.sampler.draw(s.step, 0)[:CHECKED_UNITS]
    check_gradients_of(s, units if len(units) > 1 else np.arange(min(CHECKED_UNITS, len(s.data.units))))


def check_gradients_of(holder: Holder, units: np.ndarray) -> None:
    """The same for some units of whoever holds them.

    Raises:
      SottoError: SOT610, engine and autograd differ; SOT513, they do not fit in memory.
    """
    s = holder
    examples, unit_of = s.data.units.members_of(units)
    was_training = s.model.training
    s.model.eval()  # dropout would make any two passes differ
    few = max(1, min(CHECKED_EXAMPLES, s.microbatch_size) // CHECKED_UNITS)
    try:
        while True:
            kept = np.sort(np.concatenate([np.flatnonzero(unit_of == unit)[:few] for unit in np.unique(unit_of)]))
            try:
                _verify(s, examples[kept], unit_of[kept])
                return
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if few == 1:
                    raise _does_not_fit(s) from None
            few //= 2
    finally:
        s.model.train(was_training)


def _verify(s: Holder, examples: np.ndarray, unit_of: np.ndarray) -> None:
    if isinstance(s.engine, ZerothOrder):
        s.engine.check(batch_of(s, examples))
        return
    assert isinstance(s.engine, Engine)
    units = torch.from_numpy(unit_of).to(s.device)
    # Autocast is on inside `losses_of` only, so `verify` cannot see it for itself.
    tolerance = BFLOAT16_TOLERANCE if s.config.model.dtype == "bfloat16" else None
    verify(s.engine, lambda rows: losses_of(s, examples[rows.cpu().numpy()]), units, tolerance)


def private_numbers(s: Session, total: ClippedSum, units: np.ndarray) -> dict[str, Any]:
    """What the raw sum shows of a step: for the owner of the data alone."""
    finite = torch.isfinite(total.norms)
    norms, factor_UG = total.norms[finite], s.engine.clipping.coefficients(total.group_norms[finite])
    return {
        "units": len(units),
        "clipped_fraction": float((factor_UG < 1).float().mean()) if len(norms) else None,
        "median_norm": float(norms.median()) if len(norms) else None,
        "not_finite": len(total.norms) - len(norms),
        **({"answers": dataclasses.asdict(s.engine.heard)} if isinstance(s.engine, Cohort) else {}),
    }


def public_numbers(s: Session, step: int, sensitivity: float) -> dict[str, Any]:
    """What is known of a step without the data, or from noisy releases."""
    return {
        "learning_rate": learning_rate(s.config.stepping, step, s.plan.steps),
        "noise_multiplier": s.plan.noise_multiplier,
        **({"clip_norm": sensitivity} if s.plan.private else {}),
    }


def norm_of(update: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([u.detach().float().norm() for u in update.values()]).norm())


def save_checkpoint(session: Session) -> None:
    """Writes a checkpoint: what was released and what follows from it. A microbatch that was halved because a batch did
    not fit tells of that batch, so it does not stand there; a run that is resumed halves it again.

    Raises:
      SottoError: the disk is full or read-only. The last good checkpoint is untouched.
    """
    s = session
    state = checkpoint.Checkpoint(
        step=s.step,
        weights=s.optimizer.stored_weights(),
        optimizer=s.optimizer.state_tensors(),
        extra={
            **({"clip_thresholds": clipping.thresholds} if isinstance(clipping := s.engine.clipping, Adaptive) else {}),
            **({} if s.rule is None else {"rule": s.rule.state()}),
        },
    )
    try:
        checkpoint.save(s.run.checkpoints, state)
    except OSError as error:
        raise SottoError(
            "SOT505", what=f"cannot write the checkpoint: {error.strerror or error}", where=str(s.run.checkpoints),
            why="the disk is full or read-only; the last good checkpoint is untouched",
            fix=f"make room, then: sotto resume {s.run.path}",
        ) from None  # fmt: skip


@contextmanager
def graceful_stop(session: Session) -> Iterator[None]:
    """Ctrl-C and SIGTERM finish the step and save; a second Ctrl-C stops at once (that step is charged again)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if session.stop_requested:
            raise KeyboardInterrupt
        session.stop_requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

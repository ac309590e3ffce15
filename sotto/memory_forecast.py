"""Predicts the peak memory of a training step by running that very step without data.

Nothing is estimated by a formula: the model is built without weights, and the loss, the gradient engine, the mechanism
and the optimizer of a run are executed on tensors that have shapes alone (`memory_trace`). What costs time are layers
that are all alike, so a deep model is traced with a few of them, once with a number and once with one more, and every
operation is followed from there. If the two traces do not differ by a repeated stretch alone, all layers are traced.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sotto import training
from sotto.config import Config
from sotto.gradients.base import ClippedSum
from sotto.gradients.self_check import verify
from sotto.losses import autocast, forward_losses
from sotto.memory_answers import ENDS
from sotto.memory_trace import PARTS, NotAlike, Recorder, Segment, extended, highest, pretend
from sotto.models import skeleton
from sotto.models.load import build_config
from sotto.models.reversible import ANCHOR_EVERY
from sotto.models.source import ModelFacts, inspect, resolve
from sotto.models.trainable import prepare
from sotto.optim import Optimizer
from sotto.privacy.discrete import Below
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.engine import ZerothOrder
from sotto.zeroth_order.entries import DEVICE_CHUNK, PIECE

UNITS = 3
"""Units in the smaller of the two traces that a microbatch is followed from; as many as the first check takes."""
FEW_LAYERS = 6
"""Models of up to so many layers are traced whole."""


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that are alive when most are.

    Attributes:
      train, gradient: the method, as in the configuration; never `auto`.
      microbatch_size: examples of one forward pass.
      parts: bytes by name, of `memory_trace.PARTS`. All gradients of a backward pass that are not sums over
        units count as per-unit terms; activations include the batch.
      phase: what the step is doing then; one of the parts.
      trainable: number of trained parameters.
    """

    train: str
    gradient: str
    microbatch_size: int
    parts: dict[str, int]
    phase: str
    trainable: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        return {"train": self.train, "gradient": self.gradient, "microbatch_size": self.microbatch_size,
                "peak": self.peak, "phase": self.phase, "trainable": self.trainable, "parts": self.parts}  # fmt: skip


class MemoryLaw:
    """How the memory of one method grows with the microbatch. Traces are made when they are first needed.

    A microbatch never splits a unit, so it holds at least `privacy.max_examples_per_unit` examples.
    """

    def __init__(self, config: Config, device: torch.device, facts: ModelFacts | None = None):
        """Finds the model.

        Args:
          config: its method is the one that is traced.
          device: where the run will be; kernels, and so their memory, differ.
          facts: of the model, if they are at hand. No weights are needed.

        Raises:
          SottoError: SOT300 to SOT310, the model cannot be found or built.
        """
        self.config, self.device = _fewer_probes(config), device
        self.facts = facts or inspect(resolve(config.model.name, config.model.revision), weights=False)
        self.each = config.privacy.max_examples_per_unit
        self.trainable = 0

    def at(self, microbatch_size: int) -> MemoryForecast:
        """The forecast for a microbatch of so many examples."""
        segments = self._segments(self._rows(microbatch_size))
        peak = max(segments, key=lambda s: s.bytes_PE.sum(0).max(initial=0))
        when = int(peak.bytes_PE.sum(0).argmax())
        parts = {part: int(size) for part, size in zip(PARTS, peak.bytes_PE[:, when], strict=True)}
        phase, method = peak.phase, self.config.method
        if self.loading > sum(parts.values()):
            phase, parts = "weights", {**dict.fromkeys(PARTS, 0), "weights": self.loading}
        gradient = "book_keeping" if method.gradient == "auto" else method.gradient
        return MemoryForecast(method.train, gradient, microbatch_size, parts, phase, self.trainable)

    @cached_property
    def loading(self) -> int:
        """Bytes of the weights as they are read, where those that are frozen are rounded only afterwards; else 0."""
        if self.config.method.frozen_weights == "float32":
            return 0
        with torch.device("meta"):
            return sum(p.numel() * p.itemsize for p in self._build(None).parameters())

    def largest(self, room: int, limit: int) -> int:
        """The largest microbatch of at most `limit` examples whose peak is at most `room` bytes; 0 if there is none."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(middle).peak <= room else (low, middle - 1)
        return low

    def _rows(self, microbatch_size: int) -> int:
        return max(microbatch_size, self.each)

    def _segments(self, rows: int) -> list[Segment]:
        check, first, second = self._line
        apart = UNITS * self.each
        return check + [a.towards(b, (rows - apart) / apart) for a, b in zip(first, second, strict=True)]

    @cached_property
    def _line(self) -> tuple[list[Segment], list[Segment], list[Segment]]:
        """The check of the first batch, and operation by operation a step with `UNITS` units and with twice as many."""
        check, first = self._at_depth(UNITS * self.each, check=True)
        _, second = self._at_depth(2 * UNITS * self.each, check=False)
        try:
            a, b = (extended(first, second, times, sizes=False) for times in (0, 1))
            return check, a, b
        except NotAlike:  # then the peak of each phase is followed, wherever in it that is
            return check, highest(first), highest(second)

    def _at_depth(self, rows: int, check: bool) -> tuple[list[Segment], list[Segment]]:
        if self._depths is not None:
            few, more, times = self._depths
            both = self._trace(rows, few, check), self._trace(rows, more, check)
            try:
                made = [extended(first, second, times, sizes=True) for first, second in zip(*both, strict=True)]
                return made[0], made[1]
            except NotAlike:
                pass
        return self._trace(rows, None, check)

    @cached_property
    def _depths(self) -> tuple[int, int, int] | None:
        """Two numbers of layers to trace, and how many times their difference is missing after the first."""
        method = self.config.method
        with torch.device("meta"):
            whole = self._build(None)
        alike = skeleton.kinds(whole, whole.config)  # type: ignore[arg-type]
        if not alike or method.lora_layers is not None:
            return None
        period = self._period(alike)
        rest = (alike[i:] for i in range(len(alike)))
        ahead = next(i for i, part in enumerate(rest) if part[period:] == part[: max(0, len(part) - period)])
        few = ahead + 3 * period + (len(alike) - ahead) % period
        if len(alike) <= max(FEW_LAYERS, few + period):
            return None
        return few, few + period, (len(alike) - few) // period

    def _period(self, alike: Sequence[Any]) -> int:
        """After how many layers the stack repeats, up to an irregular beginning of at most half of it."""
        method = self.config.method
        own = method.side_every if method.train == "side" else 1
        if method.train == "reversible":
            own = max(1, ANCHOR_EVERY[method.reversible_streams])
        half = alike[len(alike) // 2 :]
        return next(n for n in range(own, len(alike) + own, own) if half[n:] == half[: max(0, len(half) - n)])

    def _build(self, layers: int | None) -> nn.Module:
        data, method = self.config.data, self.config.method
        return skeleton.build(
            self.facts, data.task, labels=data.labels or (), pooling=self.config.model.pooling,
            keep_dropout=method.dropout, layers=layers,
        )  # fmt: skip

    def _trace(self, rows: int, layers: int | None, check: bool) -> tuple[list[Segment], list[Segment]]:
        """Segments of the check of the first batch (none without `check`), and those of a step."""
        with warnings.catch_warnings():  # of addresses and gradients that fake tensors do not have
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            return self._run(rows, layers, check)

    def _run(self, rows: int, layers: int | None, check: bool) -> tuple[list[Segment], list[Segment]]:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        text = build_config(self.facts, keep_dropout=True).get_text_config()
        recorder = Recorder(fake, text.vocab_size if self.config.data.task == "generation" else 0)
        with torch.device("meta"), recorder, recorder.during("weights"):
            model = self._build(layers)
        pretend(model, fake, torch.device("cpu"))  # as in a run, whose model goes to the device when it is prepared
        with recorder, recorder.during("weights"):
            model = prepare(model, self.config.method, self.config.run.seed)
        pretend(model, fake, self.device)
        with recorder.during("weights"):
            frozen = [p for p in model.parameters() if not p.requires_grad]
            recorder.assign([*frozen, *model.buffers()], "weights")
            recorder.assign([p for p in model.parameters() if p.requires_grad], "trainables")
        if layers is None or layers == skeleton.depth(build_config(self.facts, keep_dropout=True)):
            self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        begun = recorder.mark()
        with recorder:
            run = _Run(recorder, model.train(), self.config, self.device, rows)
            run.check() if check else run.warm_up()
            checked = recorder.mark()
            run.step()
        return recorder.segments(begun, checked) if check else [], recorder.segments(checked)


def _fewer_probes(config: Config) -> Config:
    """Directions are probed one pass after the other, all alike: two passes tell what many would."""
    method = config.method
    few = {"zeroth_probes": min(method.probes, max(2, method.zeroth_sides))}
    return config.model_copy(update={"method": method.model_copy(update=few)}) if method.zeroth_order else config


class _NoNoise:
    """Noise of the right size, and no values."""

    private: ClassVar[bool] = False

    def normal(self, shape: Sequence[int], std: float, *, step: int, name: str, device: torch.device) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=torch.float64, device=device)

    def rounded(self, shape: Sequence[int], std: float, *, step: int, name: str, device: torch.device) -> torch.Tensor:
        return self.normal(shape, std, step=step, name=name, device=device)

    def below(self, *, step: int, name: str) -> Below:
        return lambda n: 0

    def gamma(self, shape: float, count: int, *, step: int, name: str) -> torch.Tensor:
        return torch.empty(count, dtype=torch.float64)


class _NoDirections(Directions):
    """Directions of the right shape that move nothing, so that all passes of a check agree."""

    def _entries(
        self, name: str, role: str, step: int, k: int, start: int, stop: int, device: torch.device | None
    ) -> torch.Tensor:
        return torch.zeros(stop - start, device=device)

    def pieces(
        self, name: str, step: int, k: int, start: int, stop: int, device: torch.device
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        chunk = PIECE if device.type == "cpu" else DEVICE_CHUNK
        for begin in range(start, stop, chunk):
            end = min(begin + chunk, stop)
            yield begin, end, self.slice(name, step, k, begin, end, device)


class _Run:
    """What a run does first: the check of its first batch, and a step of which the optimizer has its state already."""

    def __init__(self, recorder: Recorder, model: nn.Module, config: Config, device: torch.device, rows: int):
        from sotto import session  # which asks for a forecast itself

        self.recorder, self.config, self.device, self.model = recorder, config, device, model
        self.engine = session.make_engine(model, config, device, "")
        if isinstance(self.engine, ZerothOrder):
            self.engine.prober.directions.__class__ = _NoDirections
            self.engine.prober.width = None  # which rows are followed must not tell how many sides a pass takes
        self.optimizer = session.make_optimizer(self.engine, config)
        recorder.assign([self.optimizer.ema, getattr(self.optimizer, "state", None)], "optimizer")
        plan: Any = SimpleNamespace(
            noise_multiplier=1.0,
            expected_batch_size=config.run.expected_batch_size,
            pure=config.method.laplace,
            exact_noise=config.exact_noise,
            setting=None,
        )
        self.mechanism = session.make_mechanism(config, plan, self.engine.clipping, _NoNoise())
        self.each = config.privacy.max_examples_per_unit
        self.batch = _batch(model, config, device, rows)
        self.units = torch.arange(rows, device=device) // self.each

    def losses(self, chosen: torch.Tensor) -> torch.Tensor:
        with self.recorder.during("activations"), autocast(self.config, self.device):
            part = {name: value[chosen] for name, value in self.batch.items()}
            return forward_losses(self.model, part, self.config.data.task)

    def clipped_sum(self, chosen: torch.Tensor) -> ClippedSum:
        if isinstance(self.engine, ZerothOrder):
            part = {name: value[chosen] for name, value in self.batch.items()}
            with self.recorder.during("activations"):
                return self.engine.clipped_sum(part, self.units[chosen], 0)
        return self.engine.backward(self.losses(chosen), self.units[chosen])

    def check(self) -> None:
        few = min(self.each, training.CHECKED_EXAMPLES // training.CHECKED_UNITS)
        of_each = [torch.nonzero(self.units == unit).flatten()[:few] for unit in range(training.CHECKED_UNITS)]
        rows = torch.cat(of_each)
        if isinstance(self.engine, ZerothOrder):
            with self.recorder.during("activations"):
                self.engine.check({name: value[rows] for name, value in self.batch.items()})
            return
        with self.recorder.during("per_unit_terms"):
            verify(self.engine, lambda chosen: self.losses(rows[chosen]), self.units[rows])

    def warm_up(self) -> None:
        """An engine looks at the model in its first pass, which in a run is the check's."""
        self.clipped_sum(torch.zeros(1, dtype=torch.long, device=self.device))

    def step(self) -> None:
        if isinstance(self.optimizer, Optimizer):
            with self.recorder.during("optimizer"):
                self.optimizer.step({n: torch.zeros_like(p) for n, p in self.engine.parameters.items()}, 0)
        with self.recorder.during("per_unit_terms"):
            total = self.engine.zeros()
            self.recorder.assign(total.gradients, "gradients")
            total += self.clipped_sum(torch.arange(len(self.units), device=self.device))
        with self.recorder.during("noise"):
            update = self.mechanism.privatize(total, 1)
            del total
        if isinstance(self.optimizer, Optimizer):  # zeroth-order updates are made in place, a chunk at a time
            with self.recorder.during("optimizer"):
                self.optimizer.step(update, 1)
                training.norm_of(update)


def _batch(model: nn.Module, config: Config, device: torch.device, rows: int) -> dict[str, torch.Tensor]:
    """Examples of `data.max_length` tokens, of which the last is padding, so that it has to be masked: but for the one
    case in which full examples take more."""
    text: Any = model.config.get_text_config()  # type: ignore[union-attr]
    length = config.data.max_length
    ids_BT = (torch.arange(rows * length, device=device) * 7 + 3).remainder(text.vocab_size).view(rows, length)
    if text.is_encoder_decoder:  # its classifiers look for the end of the text
        ids_BT[ids_BT == text.eos_token_id] = text.vocab_size - 1
        ids_BT[:, -1] = text.eos_token_id
        setattr(ids_BT, ENDS, True)
    mask_BT = torch.ones_like(ids_BT)
    if not full_examples_take_more(text, config.model.dtype, device):
        mask_BT[:, -1] = 0
    labels = ids_BT if config.data.task == "generation" else torch.zeros(rows, dtype=torch.long, device=device)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels}


def full_examples_take_more(text: Any, dtype: str, device: torch.device) -> bool:
    """Without a mask, a model with grouped keys leaves their repetition to torch's attention, of which no kernel for
    CUDA can do that in float32: the plain formula is taken then, and a step holds every score."""
    grouped = getattr(text, "num_key_value_heads", None) not in (None, getattr(text, "num_attention_heads", None))
    return device.type == "cuda" and grouped and dtype == "float32"

"""The clipped sum of a step, from forward passes alone: what the loop needs of an engine.

    engine = ZerothOrder(model, forward, Directions(key, shapes, K), Flat(1.0))
    total = engine.clipped_sum(batch, units, step)   # ClippedSum of one (K,) tensor

Sensitivity: the L2 norm of a unit's K numbers after clipping, or their L1 norm with `order=1`; adding or removing a
unit moves the sum by at most that, whatever K is. Event: Poisson-sampled Gaussian, or Laplace. The directions are
public; what they are does not enter the guarantee (Zhang et al. 2024, arXiv:2310.09639, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from sotto.config import MethodSection
from sotto.gradients.base import ClippedSum
from sotto.gradients.clipping import Clipping
from sotto.models import support
from sotto.zeroth_order import presets
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.law import Law
from sotto.zeroth_order.perturb import Batch
from sotto.zeroth_order.probes import Forward, Prober, trainable
from sotto.zeroth_order.pruning import masks
from sotto.zeroth_order.release import NAME, Release


class ZerothOrder:
    """Clipped sums of per-unit finite differences of one model, which is left as it is, bit by bit.

    Attributes:
      parameters: name -> trainable parameter.
      clipping: of a unit's K numbers as one vector.
      directions: where the loss is probed.
    """

    arrangement: ClassVar[Any] = None
    verified: ClassVar[Any] = None

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        directions: Directions,
        clipping: Clipping,
        *,
        order: int = 2,
        smoothing: float = 1e-3,
        sides: int = 1,
    ):
        """Sets up the engine; runs nothing.

        Args:
          model: in evaluation mode, or without dropout.
          forward: batch -> (B,) losses, one for each row, in float32 or better.
          directions: for exactly the trainable parameters of the model.
          order: the norm in which a unit's numbers are clipped: 2 for Gaussian noise, 1 for Laplace noise.
          smoothing, sides: as for `probes.Prober`.

        Raises:
          SottoError: SOT401, SOT650 or SOT651, as for `probes.Prober`.
        """
        alone = getattr(model, "layers_stand_alone", True)
        self.prober = Prober(model, forward, directions, smoothing, sides=sides, reuse_prefix=alone)
        self.release = Release(clipping, directions.width, order)
        self.parameters, self.clipping, self.directions = self.prober.parameters, clipping, directions
        clipping.group_of([NAME])  # tells one whose bounds follow the norms that there is one group

    def zeros(self) -> ClippedSum:
        """The sum over no units at all."""
        return self.release.zeros()

    def clipped_sum(self, batch: Batch, units: torch.Tensor | None, step: int, part: int = 0) -> ClippedSum:
        """Probes a batch and adds up its units' clipped numbers.

        Args:
          batch: tensors with B rows each.
          units: (B,) integer that says to whom each row belongs; default: every row is a unit of its own. All rows of a
            unit must be in this batch.
          step: which directions.
          part: which these units look at: of the numbers of all parts, theirs are those of this one, and the others 0.

        Raises:
          SottoError: SOT651 to SOT654, SOT657, the model or the loss cannot be probed.
        """
        sketch_UK, before = self.prober.sketch(batch, step, units, part), part * self.directions.count
        after = self.directions.width - before - self.directions.count
        return self.release.clipped_sum(F.pad(sketch_UK, (before, after)) if before or after else sketch_UK)

    def check(self, batch: Batch) -> None:
        """Compares the passes of the probes with plain ones on a batch; see `probes.Prober.check`."""
        self.prober.check(batch)

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield

    def detach(self) -> None:
        """There is nothing to take away from the model."""


def build(
    model: nn.Module, method: MethodSection, forward: Forward, clipping: Clipping, key: str, parts: int = 1
) -> ZerothOrder:
    """The engine of a configuration.

    Args:
      model: prepared for training, in evaluation mode.
      key: of the run's directions.
      parts: of `Directions`.
    """
    return ZerothOrder(
        model,
        forward,
        directions(model, method, key, parts),
        clipping,
        order=1 if method.laplace else 2,
        smoothing=method.zeroth_smoothing,
        sides=method.zeroth_sides,
    )


def directions(model: nn.Module, method: MethodSection, key: str, parts: int = 1) -> Directions:
    """The directions of a run: public, and a function of the key, the configuration and the untrained model."""
    parameters, preset = trainable(model), presets.PRESETS[method.zeroth_preset]
    kept = masks(model, parameters, preset.keep) if preset.keep < 1 else None
    law = Law(presets.law(method), method.zeroth_rank)
    shapes = {n: p.shape for n, p in parameters.items()}
    classes = scoring_weights(model, parameters) if preset.over_classes and law.rank == 0 else []
    return Directions(key, shapes, method.probes, law, kept, classes, method.zeroth_centred, parts)


def scoring_weights(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the trained weights whose first axis runs over the classes: those of a classifier's last layer."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not support.is_classifier(inner) or inner.config.num_labels < 2:
        return []
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" in parameters]
    last = [name for name in (f"{linear[-1]}.weight", f"{linear[-1]}.bias") if name in parameters] if linear else []
    return [name for name in last if parameters[name].shape[0] == inner.config.num_labels]

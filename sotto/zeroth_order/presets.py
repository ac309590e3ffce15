"""What `method.zeroth_preset` stands for, each with its paper. Nothing here needs torch.

* `aggzo` (Bao et al. 2025, DP-AggZO, USENIX Security): K directions in a step, and the K numbers of a unit clipped
  together, so that K costs no privacy. In the place of independent Gaussian directions, each probed on both sides, it
  has sign directions that are orthogonal within a step and across steps, one pass for each of them (`probes`, centred
  differences), and none that adds the same to the scores of all classes. Each was kept because it measured better at
  the same number of passes (benchmarks/RESULTS.md).
* `dpzero` (Zhang et al. 2024, DPZero, arXiv:2310.09639, algorithm 2): one direction from the sphere, and neighbouring
  datasets that differ by one replaced record, as published.
* `dpzo` (Tang et al. 2025, DP-ZO, arXiv:2401.04343): one Gaussian direction; with Gaussian noise, or with Laplace noise
  for pure epsilon-DP.
* `dpzopo` (Liu et al. 2024, DP-ZOPO, arXiv:2402.07818): stages, each twice as long as the one before, at half its rate
  and held to where it began; and only the weights that a data-free score picks are perturbed (`pruning`). Several
  directions are clipped together: the released code clips each of them alone and adds noise for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sotto.config import MethodSection


@dataclass(frozen=True)
class Preset:
    """What a configuration leaves open.

    Attributes:
      law: of the directions' entries, one of `law.LAWS`.
      keep: the part of the weights that is perturbed; 1 for all.
      stages: 1, or the number of stages.
      proximal: weight of the pull towards where the stage began.
      over_classes: whether the directions of a classifier's last layer add up to zero over the classes.
    """

    law: str
    keep: float = 1.0
    stages: int = 1
    proximal: float = 0.0
    over_classes: bool = False


PRESETS = {
    "aggzo": Preset("orthogonal", over_classes=True),
    "dpzero": Preset("sphere"),
    "dpzo": Preset("gaussian"),
    "dpzopo": Preset("gaussian", keep=0.01, stages=3, proximal=5e-4),
}


def law(method: MethodSection) -> str:
    if method.zeroth_directions != "preset":
        return method.zeroth_directions
    chosen = PRESETS[method.zeroth_preset].law
    return "rademacher" if method.zeroth_rank and chosen == "orthogonal" else chosen


def stage_lengths(steps: int, stages: int) -> list[int]:
    """Lengths of stages that double, and add up to `steps`: the last one takes what rounding left."""
    whole = 2**stages - 1
    lengths = [steps * 2**k // whole for k in range(stages)]
    lengths[-1] += steps - sum(lengths)
    return [n for n in lengths if n]

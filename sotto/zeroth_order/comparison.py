"""When two passes over the same texts count as the same, and what is said where they do not."""

from __future__ import annotations

import torch
from torch import nn

from sotto.errors import SottoError

_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


def require_same(model: nn.Module, a: torch.Tensor, b: torch.Tensor, error: SottoError, overflow: bool = True) -> None:
    """Compares losses (B,) of a model as exactly as the type of its weights allows.

    Args:
      a, b: expected, and found.
      overflow: whether a loss that is not finite in one of them is left out, as rounding decides where that begins.

    Raises:
      SottoError: the one that was given.
    """
    tolerance = max([2e-4, *(_TOLERANCE.get(p.dtype, 0.0) for p in model.parameters())])
    if torch.is_autocast_enabled(a.device.type):
        tolerance = max(tolerance, _TOLERANCE[torch.bfloat16])
    finite = torch.isfinite(a) if not overflow else torch.isfinite(a) & torch.isfinite(b)
    if not bool(((a - b).abs() <= tolerance * (1 + a.abs()))[finite].all()):
        raise error


def coupled() -> SottoError:
    return SottoError(
        "SOT652", what="an example's loss depends on the other examples of the batch", where="forward",
        why="then clipping each example bounds nobody's influence",
        fix="use a loss with reduction='none' and no normalisation over the batch, and mask padding",
    )  # fmt: skip


def unread() -> SottoError:
    return SottoError(
        "SOT655", what="no function of the forward pass is given a trainable weight", where="zeroth_order.probes",
        why="every direction would say zero, and the steps would be noise alone",
        fix="train weights of the model that the loss is computed with, and no scripted copy of it",
    )  # fmt: skip


def differ(what: str) -> SottoError:
    return SottoError(
        "SOT655", what=f"{what} gives other losses than moved weights do", where="zeroth_order.probes",
        why="the numbers would not be derivatives along the directions", fix="set sides=1 and reuse_prefix=False; if "
        "it stays, the model reads weights where torch functions cannot be overridden (a scripted module)",
    )  # fmt: skip

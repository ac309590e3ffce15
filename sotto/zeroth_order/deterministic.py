"""What must not be random: the two passes whose difference is taken may differ by their weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from sotto.errors import SottoError
from sotto.zeroth_order.reading import Function, name_of

# Functions that draw random numbers: (position of the probability, position of `training`), None where there is none.
_DRAWS: dict[str, tuple[int | None, int | None]] = {
    **dict.fromkeys(
        ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"],
        (1, 2),
    ),
    "dropout_": (1, 2),
    "alpha_dropout_": (1, 2),
    "native_dropout": (1, 2),
    "scaled_dot_product_attention": (4, None),
    "bernoulli": (None, None),
    "bernoulli_": (None, None),
    "rand_like": (None, None),
    "randn_like": (None, None),
    "multinomial": (None, None),
    "normal_": (None, None),
    "uniform_": (None, None),
}


def require_deterministic(model: nn.Module) -> None:
    """Refuses a model whose two passes would differ for another reason than the weights.

    Raises:
      SottoError: SOT651, a module in training mode drops out, or normalises over the batch.
    """
    for path, module in model.named_modules():
        if not module.training:
            continue
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        drops |= isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0
        if drops or isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise _random(f"{path} ({type(module).__name__})")


def require_no_randomness(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a function that draws random numbers; models also drop out by functions that are no modules.

    Raises:
      SottoError: SOT651.
    """
    name = name_of(func)
    if name not in _DRAWS:
        return
    probability, training = _DRAWS[name]
    defaults = (0.0 if name.startswith("scaled") else 0.5, True)
    p = _argument(args, kwargs, probability, ("p", "dropout_p"), defaults[0])
    active = _argument(args, kwargs, training, ("training", "train"), defaults[1])
    if active and (probability is None or p > 0):
        raise _random(name)


def run(forward: Callable[[], torch.Tensor], devices: Iterable[torch.device]) -> torch.Tensor:
    """forward(), which may not depend on numbers from torch's default generators.

    Whether one was asked is seen from its state, which takes no time. If so, the pass is run again: to say which
    function asks, and as another thread may have asked.

    Raises:
      SottoError: SOT651.
    """
    before = _states(devices)
    losses = forward()
    if _states(devices) == before or isinstance(losses, FakeTensor):
        return losses
    with Refusing():
        again = forward()
    if not torch.allclose(losses, again, rtol=0, atol=0, equal_nan=True):
        raise _random("the forward pass")
    return losses


class Refusing(TorchFunctionMode):
    """Context: a function that draws random numbers is refused, from whichever generator. It takes a while."""

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        require_no_randomness(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _states(devices: Iterable[torch.device]) -> list[bytes]:
    """Of the generators of the processor and of these devices (a forecast may name one that is not there)."""
    states = [torch.get_rng_state()]
    for device in devices:
        module: Any = torch.get_device_module(device) if device.type not in ("cpu", "meta") else None
        if module is not None and module.is_available():
            states.append(module.get_rng_state(device))
    return [state.numpy().tobytes() for state in states]


def _argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int | None, names: tuple[str, ...], default: Any
) -> Any:
    if place is not None and len(args) > place:
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _random(what: str) -> SottoError:
    return SottoError(
        "SOT651",
        what=f"{what} makes two forward passes under the same weights differ",
        where=what,
        why="the difference of two losses is divided by a small number, so dropout would drown what is measured",
        fix="call model.eval() before probing",
    )

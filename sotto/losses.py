"""One loss per example, never an average over the batch: the batch average would couple the examples.

The logits of a language model, (B, T, V), are the largest tensor of a training step, and the usual loss makes three
more of their size. Here they turn into their own gradient in place; where the output layer is frozen, they are made,
used and dropped a few tokens at a time (as Hsu et al. 2024, arXiv 2410.10989, do for the batch's mean loss). Without
gradients they are made some words of the vocabulary at a time, and a running sum is kept (as Wijmans et al. 2024, arXiv
2411.09009): so each weight of the output layer is read once, which matters where it is moved for that.

Shape legend: B examples, T tokens, V vocabulary, d features, N tokens of all examples, n of one chunk or with a loss,
w words of one chunk.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sotto.config import Config

IGNORED = -100
CHUNK = 1 << 20
"""Logits that are worked on at once: few enough to stay in a processor's cache."""
WORDS, DEVICE_WORDS = 1 << 21, 1 << 24
"""Weights of the output layer that are worked on at once, on a CPU and elsewhere."""

# Nodes of the graph that do not keep what they gave, so that it may be overwritten, and nodes that only view it.
# Overwriting what is kept would not be silent: autograd raises when it meets another version of a tensor.
GIVES = frozenset({"_LinearBackward", "AddmmBackward0", "MmBackward0", "MulBackward0", "DivBackward0"})
VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0"})

_heads_as_they_are: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The arithmetic of `model.dtype`, for a forward pass."""
    if config.model.dtype == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def forward_losses(model: nn.Module, batch: dict[str, torch.Tensor], task: str, in_rows: bool = False) -> torch.Tensor:
    """Runs the model and returns (B,) losses.

    Args:
      batch: `input_ids`, `attention_mask` (B, T), optionally `token_type_ids`, and `labels`: (B,) classes, or (B, T)
        tokens with -100 where no loss is taken.
      in_rows: without gradients, whether the weight of a trained output layer may be asked for some rows at a time.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if task == "classification":
        return classification(model(**inputs).logits, batch["labels"])
    head = _plain_head(model, inputs, trained=in_rows and not torch.is_grad_enabled())
    if head is None:
        return _language(model(**inputs).logits, batch["labels"], overwrite=True)
    hidden_BTd = _without_head(model, head, inputs)
    assert hidden_BTd is not None
    targets_BT = _next(batch["labels"])
    if not torch.is_grad_enabled():
        return _through(head, hidden_BTd, targets_BT)
    return _FrozenHead.apply(hidden_BTd, head.weight, head.bias, targets_BT)  # type: ignore[no-any-return]


def look_at_head(model: nn.Module, device: torch.device) -> None:
    """Finds out whether the logits of a language model are what its output layer gives, by a pass of one token.

    Losses without gradients need no logits as a whole from then on. They could not ask themselves: within a pass that
    somebody watches there is no place for another.
    """
    token: Any = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.enable_grad():
        _plain_head(model, {"input_ids": token, "attention_mask": torch.ones_like(token)}, trained=True)


def classification(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(_float32_or_better(logits_BC), labels_B, reduction="none")


def token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) next-token losses, zero where no loss is taken, and the (B,) number of tokens that count."""
    targets = _next(labels_BT)
    logits_NV = logits_BTV.flatten(0, 1)
    whole = torch.is_grad_enabled() and logits_NV.requires_grad
    most = 32 * CHUNK if logits_NV.is_cuda else CHUNK
    step = max(1, len(logits_NV) if whole else most // logits_NV.shape[1])
    pairs = zip(logits_NV.split(step), targets.flatten().split(step), strict=True)
    losses_N = torch.cat([_cross_entropy(*pair) for pair in pairs])
    return losses_N.view(targets.shape), (targets != IGNORED).sum(1)


def _cross_entropy(logits_nV: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(_float32_or_better(logits_nV), targets_n, ignore_index=IGNORED, reduction="none")


def _through(head: nn.Linear, hidden_BTd: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """(B,) mean losses of what enters the output layer, without gradients; other tokens need no logits at all."""
    _, counts_B1 = _weights(targets_BT)
    targets_N = targets_BT.flatten()
    counting = torch.nonzero(targets_N != IGNORED).flatten()
    losses_n = _token_losses_through(head, hidden_BTd.flatten(0, 1)[counting], targets_N[counting])
    losses_N = losses_n.new_zeros(targets_N.shape).index_copy(0, counting, losses_n)
    return (losses_N.view(targets_BT.shape) / counts_B1).sum(1)


def _token_losses_through(head: nn.Linear, hidden_nd: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
    """(n,) losses; of the logits some words at a time, so that each weight is read once."""
    words, d = head.weight.shape
    weights, logits = (DEVICE_WORDS, 32 * CHUNK) if hidden_nd.is_cuda else (WORDS, 8 * CHUNK)
    step = max(1, min(weights // d, logits // max(1, len(hidden_nd))))
    step -= step % 64 if step > 64 else 0  # products that begin elsewhere take longer
    most_n = hidden_nd.new_full(targets_n.shape, -torch.inf, dtype=torch.float32)
    sum_n = wanted_n = torch.zeros_like(most_n)
    for start in range(0, words, step):
        at = slice(start, min(start + step, words))
        bias_w = None if head.bias is None else head.bias[at]
        logits_nw = _float32_or_better(F.linear(hidden_nd, head.weight[at], bias_w))
        before_n, most_n = most_n, torch.maximum(most_n, logits_nw.detach().amax(1))
        inside_n = (targets_n >= at.start) & (targets_n < at.stop)
        place_n1 = (targets_n - at.start).clamp(0, at.stop - at.start - 1)[:, None]
        wanted_n = torch.where(inside_n, logits_nw.gather(1, place_n1)[:, 0], wanted_n)
        sum_n = sum_n * (before_n - most_n).exp() + logits_nw.sub_(most_n[:, None]).exp_().sum(1)
    return most_n + sum_n.log() - wanted_n


def language(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """(B,) mean loss over each example's own tokens, in nats."""
    return _language(logits_BTV, labels_BT, overwrite=False)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items()}


def _float32_or_better(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _next(labels_BT: torch.Tensor) -> torch.Tensor:
    """What each position has to predict. Shifting the labels instead of the logits saves a copy of the logits."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def _language(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, overwrite: bool) -> torch.Tensor:
    if not (torch.is_grad_enabled() and logits_BTV.requires_grad):
        losses_BT, counts_B = token_losses(logits_BTV, labels_BT)
        return losses_BT.sum(1) / counts_B.clamp(min=1)
    overwrite = overwrite and logits_BTV.is_contiguous() and _is_not_kept(logits_BTV)
    return _OwnGradient.apply(logits_BTV, _next(labels_BT), overwrite)  # type: ignore[no-any-return]


def _is_not_kept(x: torch.Tensor) -> bool:
    node = x.grad_fn
    while node is not None and type(node).__name__ in VIEWS:
        node = node.next_functions[0][0]
    return type(node).__name__ in GIVES


def _to_gradient(logits_nV: torch.Tensor, targets_n: torch.Tensor, weight_n: torch.Tensor) -> torch.Tensor:
    """Returns (n,) token losses; the logits become the gradient of the losses' weighted sum.

    Where the weight is zero, loss and gradient are zero too, unless the logits are not finite.
    """
    x_nV = _float32_or_better(logits_nV)
    wanted_n1 = targets_n.clamp(min=0)[:, None]
    log_sum_n = torch.logsumexp(x_nV, 1)
    losses_n = torch.where(targets_n == IGNORED, 0, log_sum_n - x_nV.gather(1, wanted_n1)[:, 0])
    weight_n = weight_n.to(x_nV.dtype)
    x_nV.sub_((log_sum_n - weight_n.log())[:, None]).exp_()  # weight times softmax
    x_nV.scatter_add_(1, wanted_n1, -weight_n[:, None])
    if x_nV is not logits_nV:
        logits_nV.copy_(x_nV)
    return losses_n


def _weights(targets_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) what each token counts in its example's mean loss, and the (B, 1) number of tokens that count."""
    counts_B1 = (targets_BT != IGNORED).sum(1, keepdim=True).clamp(min=1)
    return ((targets_BT != IGNORED).double() / counts_B1).flatten(), counts_B1


def _times(gradient_BTx: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
    """The gradient of losses that are weighted; without a copy if all weights are one, as they nearly always are."""
    if bool((weight_B == 1).all()):
        return gradient_BTx
    return gradient_BTx * weight_B[:, None, None].to(gradient_BTx.dtype)


class _OwnGradient(torch.autograd.Function):
    """(B,) mean losses of logits, which are overwritten by the losses' gradient or stay as they are."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: torch.Tensor, targets_BT: torch.Tensor, overwrite: bool):
        # detach shares the version counter, so whoever kept the logits after all finds out.
        gradient_BTV = logits_BTV.detach() if overwrite else logits_BTV.detach().clone(
            memory_format=torch.contiguous_format
        )  # fmt: skip
        weight_N, counts_B1 = _weights(targets_BT)
        step = max(1, CHUNK // gradient_BTV.shape[2])
        chunks = zip(
            gradient_BTV.flatten(0, 1).split(step), targets_BT.flatten().split(step), weight_N.split(step), strict=True
        )
        losses_N = torch.cat([_to_gradient(*chunk) for chunk in chunks])
        ctx.save_for_backward(gradient_BTV)
        return (losses_N.view(targets_BT.shape) / counts_B1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):
        (gradient_BTV,) = ctx.saved_tensors
        return _times(gradient_BTV, grads[0]), None, None


class _FrozenHead(torch.autograd.Function):
    """(B,) mean losses of hidden states through a frozen output layer, of which no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTd: torch.Tensor,
        weight_Vd: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_BT: torch.Tensor,
    ):
        weight_N, counts_B1 = _weights(targets_BT)
        hidden_Nd, targets_N = hidden_BTd.detach().flatten(0, 1), targets_BT.flatten()
        counting = torch.nonzero(targets_N != IGNORED).flatten()  # other tokens need no logits at all
        gradient_Nd = torch.zeros_like(hidden_Nd)
        losses_N = torch.zeros_like(_float32_or_better(hidden_Nd[:, 0]))
        for at_n in counting.split(max(1, 8 * CHUNK // len(weight_Vd))):
            logits_nV = F.linear(hidden_Nd[at_n], weight_Vd, bias_V)
            losses_N[at_n] = _to_gradient(logits_nV, targets_N[at_n], weight_N[at_n]).to(losses_N.dtype)
            gradient_Nd[at_n] = F.linear(logits_nV, weight_Vd.T).to(gradient_Nd.dtype)
        ctx.save_for_backward(gradient_Nd.view(hidden_BTd.shape))
        return (losses_N.view(targets_BT.shape) / counts_B1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):
        (gradient_BTd,) = ctx.saved_tensors
        return _times(gradient_BTd, grads[0]), None, None, None


def _plain_head(model: nn.Module, inputs: dict[str, torch.Tensor], trained: bool) -> nn.Linear | None:
    """The model's output layer, if it is a linear layer whose output the model returns as it is; frozen, or any.

    Some families scale or cap their logits. That is found out once for each model, on the first example.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    hooked = isinstance(head, nn.Module) and (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
    if type(head) is not nn.Linear or hooked or "forward" in head.__dict__:
        return None
    if not trained and any(p.requires_grad for p in head.parameters()):
        return None
    if model not in _heads_as_they_are:
        if not torch.is_grad_enabled():
            return None
        first = {name: value[:1] for name, value in inputs.items()}
        devices = [head.weight.device] if head.weight.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            _heads_as_they_are[model] = _without_head(model, head, first) is not None
    return head if _heads_as_they_are[model] else None


def _without_head(model: nn.Module, head: nn.Linear, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Runs all but the output layer. Returns what would enter it, or None if the model changes what comes out of it."""
    seen: list[torch.Tensor] = []

    def stand_in(input: torch.Tensor) -> torch.Tensor:
        seen.append(input)
        return input

    head.forward = stand_in  # type: ignore[method-assign]
    try:
        logits = model(**inputs).logits
    finally:
        del head.forward
    return logits if len(seen) == 1 and logits is seen[0] and logits.dim() == 3 else None

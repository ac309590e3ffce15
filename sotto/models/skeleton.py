"""A model's modules from config.json alone, with fewer layers if wanted: for questions about shapes, not values.

Inside `torch.device("meta")` or a fake tensor mode, a model of any size is built in about a second and no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.initialization import no_init_weights

from sotto.models import support
from sotto.models.load import Task, build_config, zero_output_layer
from sotto.models.pooling import MeanPooledClassifier, plain_class
from sotto.models.source import ModelFacts

_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def build(
    facts: ModelFacts,
    task: Task,
    *,
    labels: Sequence[str],
    pooling: str,
    keep_dropout: bool,
    layers: int | None = None,
) -> nn.Module:
    """Builds what `load.build_network` builds, without weights.

    Args:
      facts: of a folder that needs to hold no more than config.json.
      layers: how many layers the stack (or each of an encoder's and a decoder's) gets; None: as the folder says.

    Returns:
      the model in evaluation mode; its weights hold nothing, but those that start at zero.

    Raises:
      SottoError: SOT306 or SOT310, as for `load.build_network`.
    """
    config = build_config(facts, keep_dropout=keep_dropout)
    if layers is not None:
        config = shortened(config, layers)
    auto: Any = AutoModelForCausalLM
    if task == "classification":
        auto = AutoModelForSequenceClassification
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    with support.quiet(), no_init_weights():
        if task == "classification" and pooling == "mean":
            backbone_class, options = plain_class(config)
            network: Any = MeanPooledClassifier(backbone_class._from_config(config, **options))
        else:
            network = auto.from_config(config, trust_remote_code=False)
            network.tie_weights()
    if task == "classification":
        zero_output_layer(network)
    support.set_padding(network, config.get_text_config().pad_token_id or 0)
    return network.eval()


def depth(config: PreTrainedConfig) -> int:
    """The number of layers of the stack that reads text; 0 when the configuration has no such number."""
    return int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0)


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy with another number of layers. Lists with one entry for each layer are cut with it."""
    made = copy.deepcopy(config)
    part: Any = made.get_text_config()
    before = depth(config)
    for name in _COUNTS:
        if getattr(part, name, None) == before:
            setattr(part, name, layers)
    for name, value in list(vars(part).items()):
        if isinstance(value, list | tuple) and len(value) == before:
            setattr(part, name, value[:layers])
    return made


def kinds(model: nn.Module, config: PreTrainedConfig) -> list[Any]:
    """For each layer, something that is equal for two layers if they are alike: class, shapes, and what lists say.

    Returns an empty list when there is no list of that many layers.
    """
    count, part = depth(config), config.get_text_config()
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if count == 0 or not stacks:
        return []
    lists = [v for v in vars(part).values() if isinstance(v, list | tuple) and len(v) == count]
    return [
        tuple(_kind(stack[i]) for stack in stacks) + tuple(str(values[i]) for values in lists) for i in range(count)
    ]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    modules = tuple(type(m).__name__ for m in layer.modules())
    return modules, tuple((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())

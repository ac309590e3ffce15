"""What side and reversible networks share: a transformers model class around a pretrained model.

The wrapper makes the changed function a model of its own, with a `model_type` of its own. A folder of its weights
cannot be opened by mistake as the plain model, which would answer, and answer otherwise. Importing this package
registers the classes under transformers' Auto classes; no code lies in the folder.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec

from sotto.models import support
from sotto.models.pooling import MeanPooledClassifier, plain_class
from sotto.models.stack import Stack, find


class WrappedConfig(PreTrainedConfig):
    """The pretrained model's configuration, and how it was changed.

    Attributes:
      text_config: of the pretrained model.
      pooling: `model` or `mean`, as in `model.pooling`.
      options: keyword arguments of the options class of the method.
    """

    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert")}  # noqa: RUF012

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    pooling: str = "model"
    options: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        text: Any = self.text_config
        self.tie_word_embeddings = text.tie_word_embeddings
        self.pad_token_id = text.pad_token_id
        self.max_position_embeddings = getattr(text, "max_position_embeddings", None)

    @classmethod
    def around(cls, model: nn.Module, options: dict[str, Any]) -> WrappedConfig:
        """The configuration of a wrapper around `model`."""
        # A copy, because a transformers model changes the configuration that it is built with.
        inner: Any = copy.deepcopy(model.config)
        labels = {"id2label": inner.id2label, "label2id": inner.label2id} if support.is_classifier(model) else {}
        pooling = "mean" if isinstance(model, MeanPooledClassifier) else "model"
        config = cls(text_config=inner, pooling=pooling, options=options, **labels)
        config._name_or_path = inner._name_or_path
        return config


class Wrapped(PreTrainedModel):
    """A pretrained model, `backbone`, whose layers run in another way.

    Output, arguments and `generate` are those of the backbone.
    """

    base_model_prefix = "backbone"
    _supports_sdpa = _supports_flash_attn = True
    classifies = False

    def __init__(self, config: WrappedConfig, backbone: nn.Module | None = None):
        super().__init__(config)
        self.backbone = backbone if backbone is not None else _empty(config, self.classifies)
        config.text_config = self.backbone.config  # type: ignore[assignment]
        if getattr(self.backbone, "generation_config", None) is not None:
            self.generation_config = self.backbone.generation_config
        self._build()
        self.post_init()

    def _build(self) -> None:
        """Adds what the method needs to `self.backbone`."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Backbone and additions have initialised themselves; to do it again would undo the pretraining."""

    def _init_weights(self, module: nn.Module) -> None:
        self.stack.owner._init_weights(module)  # type: ignore[operator]

    @property
    def stack(self) -> Stack:
        return find(self.backbone)

    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """See the backbone's own class. `input_ids`: (B, T); `.logits`: (B, classes) or (B, T, V)."""
        given = {"input_ids": input_ids} if input_ids is not None else {}
        return self.backbone(**given, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self.backbone, "get_output_embeddings", lambda: None)()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone.generate(*args, **kwargs)  # type: ignore[operator]


def _empty(config: WrappedConfig, classifies: bool) -> nn.Module:
    """The backbone without its weights."""
    inner: Any = copy.deepcopy(config.text_config)
    inner._attn_implementation = None  # to be chosen as for any other model of this kind
    if config.pooling == "mean":
        inner.id2label = config.id2label
        backbone_class, options = plain_class(inner)
        return MeanPooledClassifier(backbone_class._from_config(inner, **options))
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    return auto.from_config(inner)

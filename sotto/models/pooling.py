"""A classifier for sentence encoders: the mean of the token vectors, then one linear layer.

Sentence encoders (all-MiniLM, E5, GTE, ...) are pretrained so that the *mean* of their token vectors carries the
meaning (Reimers and Gurevych 2019, arXiv 1908.10084). Transformers' own classification classes read the first token
through a pooler that those checkpoints never trained.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from sotto.errors import SottoError
from sotto.models.source import ModelFacts


class MeanPooledClassifier(nn.Module):
    """Backbone, masked mean over tokens, linear classifier.

    Weights are named as in the matching transformers class: `bert.*` (whatever the backbone calls itself) and
    `classifier.*`. The classifier starts at zero; see `load.zero_output_layer` for why.

    Attributes:
      config: the backbone's configuration; `id2label` gives the classes.
      classifier: (hidden -> classes) linear layer.
    """

    def __init__(self, backbone: PreTrainedModel):
        super().__init__()
        self.config: PreTrainedConfig = backbone.config
        self.base_model_prefix = backbone.base_model_prefix or "model"
        self.add_module(self.base_model_prefix, backbone)
        hidden = self.config.get_text_config().hidden_size
        self.classifier = nn.Linear(hidden, len(self.config.id2label or {}))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @property
    def backbone(self) -> PreTrainedModel:
        return getattr(self, self.base_model_prefix)

    @property
    def device(self) -> torch.device:
        return self.classifier.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.classifier.weight.dtype

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Scores the classes.

        Args:
          input_ids: (B, T) tokens, or `inputs_embeds` (B, T, D) in their place.
          attention_mask: (B, T), 1 for text and 0 for padding; all ones when absent.
          labels: (B,) class indices. When given, `.loss` is the mean cross-entropy.

        Returns:
          an output whose `.logits` has shape (B, classes).
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds, **kwargs}
        given.pop("return_dict", None)
        hidden_BTD = self.backbone(**{k: v for k, v in given.items() if v is not None}).last_hidden_state
        mask_BT = hidden_BTD.new_ones(hidden_BTD.shape[:2]) if attention_mask is None else attention_mask
        logits = self.classifier(masked_mean(hidden_BTD, mask_BT).to(self.classifier.weight.dtype))
        loss = F.cross_entropy(logits.float(), labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.backbone.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.backbone.gradient_checkpointing_disable()


def masked_mean(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The mean of the token vectors where the mask is 1: (B, D), in float32 or better. A row without text gives zero.

    Padding is replaced, not multiplied by zero: 0 * nan is nan, and attention may leave nan at padded positions.
    """
    keep_BT1 = mask_BT.bool().unsqueeze(-1)
    wide = hidden_BTD.to(torch.promote_types(hidden_BTD.dtype, torch.float32))
    return torch.where(keep_BT1, wide, 0.0).sum(dim=1) / keep_BT1.sum(dim=1).clamp(min=1)


def load_pooled(
    facts: ModelFacts, config: PreTrainedConfig, **options: Any
) -> tuple[MeanPooledClassifier, dict[str, Any]]:
    """Loads a backbone without its pooler, and puts the mean and a classifier on it.

    Args:
      config: with `id2label` set to the classes.
      options: for `from_pretrained`.

    Returns:
      the model and transformers' loading report, its keys prefixed as in the whole model.

    Raises:
      SottoError: SOT310, the architecture has no plain backbone.
    """
    mapping: Any = AutoModel._model_mapping  # type: ignore[attr-defined]
    if config.is_encoder_decoder or type(config) not in mapping:
        raise SottoError(
            "SOT310",
            what=f"model.pooling: mean does not work with a model of type '{facts.model_type}'.",
            where="model.pooling",
            why="It needs one stack that turns tokens into vectors; this architecture has none, or two.",
            fix="Use an encoder such as BERT or MiniLM, or set model.pooling: model.",
        )
    backbone_class, without_pooler = plain_class(config)
    options |= without_pooler
    backbone, report = backbone_class.from_pretrained(
        str(facts.path), config=config, output_loading_info=True, **options
    )
    model = MeanPooledClassifier(backbone)
    prefix = f"{model.base_model_prefix}."
    missing = {prefix + key for key in report["missing_keys"]}
    mismatched = {(prefix + key, *shapes) for key, *shapes in report["mismatched_keys"]}
    missing |= _load_classifier(model, facts)
    return model, {**report, "missing_keys": missing, "mismatched_keys": mismatched}


def plain_class(config: PreTrainedConfig) -> tuple[Any, dict[str, bool]]:
    """The class of an architecture without any head, and the options that keep it from building a pooler.

    An unused pooler would be weights that never get a gradient, or random ones where the file has none.
    """
    classes = AutoModel._model_mapping[type(config)]  # type: ignore[attr-defined]
    backbone_class = classes[0] if isinstance(classes, list | tuple) else classes
    has_pooler = "add_pooling_layer" in inspect.signature(backbone_class.__init__).parameters
    return backbone_class, {"add_pooling_layer": False} if has_pooler else {}


def _load_classifier(model: MeanPooledClassifier, facts: ModelFacts) -> set[str]:
    """Fills the classifier from a folder that Sotto exported. Returns the keys that the folder does not have."""
    from safetensors import safe_open

    from sotto.models.source import weight_files

    own = {f"classifier.{name}": value for name, value in model.classifier.named_parameters()}
    fits = all(key in facts.tensors and facts.tensors[key].shape == tuple(own[key].shape) for key in own)
    if facts.sotto.get("pooling") != "mean" or not fits:
        return set(own)
    for file in weight_files(facts.path):
        with safe_open(file, framework="pt") as stored, torch.no_grad():
            for key in own.keys() & set(stored.keys()):
                own[key].copy_(stored.get_tensor(key))
    return set()

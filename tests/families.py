"""Tiny randomly initialised models of every causal-LM and sequence-classification family of the installed transformers.

Sizes are set by the names that configurations share; what a family needs beyond them is in `SPECIAL`. A family that
cannot be built here, or not in a size that fits a test, is in `NOT_BUILT` with the reason.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

CAUSAL, CLASSIFICATION = "causal", "classification"
AUTO = {CAUSAL: AutoModelForCausalLM, CLASSIFICATION: AutoModelForSequenceClassification}
NAMES: dict[str, list[str]] = {
    CAUSAL: sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    CLASSIFICATION: sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
}
B, T, V, LARGEST = 4, 8, 99, 2_600_000

_SIZES = {
    99: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd emb_dim dim embedding_size word_embed_proj_dim attention_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk "
    "index_n_heads linear_num_key_heads type_vocab_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts index_topk linear_num_value_heads state_size mamba_d_state "
    "time_step_rank mamba_dt_rank",
    8: "head_dim d_kv d_head qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim mamba_n_heads mamba_d_head "
    "mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim sliding_window hidden_size_per_layer_input",
    16: "q_lora_rank kv_lora_rank qk_head_dim",
    48: "intermediate_size ffn_dim d_ff n_inner d_inner dff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size hidden_dim "
    "dim_ff",
    24: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size",
    64: "max_position_embeddings n_positions max_seq_len model_max_length n_ctx",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace "
    "num_dense_layers mamba_n_groups",
    0: "num_nextn_predict_layers",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}

ONE_LATENT = {"num_key_value_heads": 4}  # attention over a shared latent has as many key heads as query heads
LATENT = ("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite")
LATENT += ("glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu", "mistral4")
HYBRID = ["linear_attention", "hybrid"] * 2
SPECIAL: dict[str, dict[str, Any]] = {
    **{name: ONE_LATENT for name in LATENT},
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {**ONE_LATENT, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (4, 2),
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
        "attention_head_size": 8,
        "feed_forward_size": 48,
    },
    "zamba2": {"layers_block_type": HYBRID, "num_hidden_layers": 4, "num_key_value_heads": 4}
    | {
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "mamba_headdim": 8,
        "attention_head_dim": 16,
        "kv_channels": 8,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "esm": {"vocab_size": V, "mask_token_id": 4},
    "esmc": ONE_LATENT,
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 48},
    "roc_bert": {
        "pronunciation_vocab_size": V,
        "shape_vocab_size": V,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "luke": {"entity_vocab_size": 9, "entity_emb_size": 8},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6, "visual_embed": False},
    "zamba": {"layers_block_type": HYBRID, "num_hidden_layers": 4, "attention_hidden_size": 64, "n_mamba_heads": 2}
    | {"attention_head_dim": 16, "num_key_value_heads": 4},
}

NARROW = ("canine", "inkling2_text", "mra", "prophetnet", "xglm")
"""Families whose code names float32, or a number that float64 does not take."""

NOT_BUILT: dict[tuple[str, str], str] = {
    (CAUSAL, "blt"): "its patcher and its hash tables stay large whatever the sizes",
    (CAUSAL, "dbrx"): "its attention configuration lacks rope_theta in this release",
    (CAUSAL, "dots3_note"): "its layers have sizes of their own, which the shared keys do not reach",
    (CAUSAL, "dots3_note_text"): "its layers have sizes of their own, which the shared keys do not reach",
    (CAUSAL, "gemma3n"): "its vision tower needs libraries that are not installed",
    (CAUSAL, "gemma3n_text"): "layers that share keys and values need more layers than a test has",
    (CAUSAL, "gemma4_assistant"): "a draft model that reads the states of another model",
    (CAUSAL, "gemma4_unified_assistant"): "a draft model that reads the states of another model",
    (CAUSAL, "gemma4_unified"): "its vision tower stays large whatever the sizes",
    (CAUSAL, "musicgen"): "it predicts audio codes",
    (CAUSAL, "musicgen_melody"): "it predicts audio codes",
    (CAUSAL, "phi4_multimodal"): "its speech encoder stays large whatever the sizes",
    (CAUSAL, "qwen4_exp"): "its default configuration leaves the indexer undefined",
    (CAUSAL, "qwen4_exp_text"): "its default configuration leaves the indexer undefined",
    (CLASSIFICATION, "layoutlmv2"): "its vision tower needs libraries that are not installed",
    (CLASSIFICATION, "mistral4"): "its rotary width does not follow from the shared keys",
    (CLASSIFICATION, "perceiver"): "its decoder stays large whatever the sizes",
}


def _is_set(default: PreTrainedConfig | None, key: str) -> bool:
    """What is None by default stays off: it switches a part of the architecture on."""
    try:
        return default is None or getattr(default, key, None) is not None
    except Exception:  # an attribute that differs between layers
        return False


def shrunken(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """Arguments that make a configuration small, for the keys that its class has."""
    try:
        default = cls()
    except Exception:  # some classes cannot be made without arguments
        default = None
    names = set(getattr(cls, "__dataclass_fields__", ())) | set(vars(default) if default is not None else ())
    known = names | set(getattr(cls, "attribute_map", {}))
    values = {k: v for k, v in SMALL.items() if k in known and _is_set(default, k)}
    values |= {k: v for k, v in TOKENS.items() if k in known}
    values |= {k: 0.0 for k in names if ("drop" in k or "jitter" in k) and isinstance(getattr(default, k, None), float)}
    for name, sub in (getattr(cls, "sub_configs", None) or {}).items():
        inner = getattr(default, name, None)
        if sub.__name__ != "AutoConfig":
            values[name] = shrunken(sub)
        elif inner is not None:
            values[name] = {**shrunken(type(inner)), "model_type": inner.model_type}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(default, name, None) if default is not None and name in vars(default) else None
        if isinstance(kinds, list) and kinds:
            # One layer of each kind, and at least two layers.
            distinct = list(dict.fromkeys(kinds))
            values[name] = distinct if len(distinct) > 1 else distinct * 2
            for count in ("num_hidden_layers", "n_layer", "num_layers"):
                if count in values:
                    values[count] = len(values[name])
    return values | SPECIAL.get(cls.model_type, {})


def build(name: str, kind: str) -> PreTrainedModel:
    """A family's model with random weights, in training mode and without dropout; float64 where its code allows.

    Raises:
      ValueError: the shrunken configuration is still too large.
    """
    cls: Any = CONFIG_MAPPING[name]
    config = cls(**shrunken(cls))
    if kind == CLASSIFICATION:
        config.num_labels = 3
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    for part in (config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))):
        part._experts_implementation = "eager"  # the grouped matrix product knows no float64
        part.use_cache = False
    with torch.device("meta"):
        size = sum(p.numel() for p in AUTO[kind].from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} weights")
    dtype = torch.float32 if name in NARROW else torch.float64
    torch.manual_seed(0)
    model = AUTO[kind].from_config(config, attn_implementation="eager").to(dtype).train()
    with torch.no_grad():  # zeros and ones hide mistakes: a gradient of zero is right for any rule
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype)
    return model


def batch(rows: int = B, length: int = T) -> dict[str, torch.Tensor]:
    """Rows of different lengths, two of them padded on the right, each ending with its only end-of-text token."""
    ids = torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(rows):
        end = length - 1 - 2 * (row % 2) - (row == 3)
        ids[row, end] = 2
        ids[row, end + 1 :] = 0
        mask[row, end + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def losses_of(model: nn.Module, inputs: dict[str, torch.Tensor], kind: str) -> Any:
    """From row indices to one loss for each: mean next-token loss over the row's own tokens, or of a class."""

    def losses(rows: torch.Tensor) -> torch.Tensor:
        part = {key: value[rows] for key, value in inputs.items()}
        logits = model(**part).logits
        if kind == CLASSIFICATION:
            return nn.functional.cross_entropy(logits.double(), rows % 3, reduction="none")
        targets = part["input_ids"].roll(-1, 1).masked_fill(part["attention_mask"].roll(-1, 1) == 0, -100)
        targets[:, -1] = -100
        token = nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
        return token.view(targets.shape).sum(1) / (targets != -100).sum(1)

    return losses

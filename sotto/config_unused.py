"""Keys that were set and that the rest of a configuration leaves without effect.

They are no error: a sweep or an override changes one key and keeps the others. But who set them should be told, so
plans and trainings say it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sotto.config import Config

OF_A_LOOP = {
    "model": ("dtype",),
    "method": ("gradient", "clipping", "clip_norm"),
    "privacy": ("delta", "neighboring_relation", "exact_noise", "dataset"),
    "run": ("spare_steps", "microbatch_size", "memory"),
    "output": ("export", "tensorboard"),
}
"""What the loop of a central or federated run reads, and neither side of a split run does."""


def unused(config: Config) -> dict[str, str]:
    """section.key -> why it changes nothing, for the keys whose value is not the default."""
    found: dict[str, str] = {}
    for section, keys, why in _without_effect(config):
        values = getattr(config, section)
        for key, field in type(values).model_fields.items():
            if key in keys and getattr(values, key) != field.default:
                found.setdefault(f"{section}.{key}", why)
    return found


def _without_effect(config: Config) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(section, keys, why), the commonest reason first."""
    method, setting = config.method, config.setting
    inside, key = (method.train, "train")
    if method.train == "reversible":
        inside, key = method.reversible_train, "reversible_train"
    else:
        yield "method", _named(method, "reversible_"), "method.train is not reversible"
    if inside != "lora":
        yield "method", _named(method, "lora_"), f"method.{key} is not lora"
    if method.train != "side":
        yield "method", _named(method, "side_"), "method.train is not side"
    if not method.zeroth_order:
        yield "method", _named(method, "zeroth_"), "method.gradient is not zeroth_order"
    if method.clipping != "adaptive":
        yield "method", ("clip_quantile", "clip_share"), "method.clipping is not adaptive"
    if config.stepping.optimizer != "sgd":
        yield "run", ("momentum",), f"run.optimizer is {config.stepping.optimizer}"
    if setting.kind == "federated":
        if setting.noise != "clients":
            yield "setting", ("dropouts",), "setting.noise is not clients"
        if method.zeroth_order:
            yield "setting", _named(setting, "local_"), "method.gradient is zeroth_order"
        if setting.sites is not None:
            yield "setting", _named(setting, "local_"), "setting.sites is set"
    if setting.kind == "split":
        if setting.exempt != "selected":
            yield "setting", ("exempt_share", "exempt_epsilon"), "setting.exempt is not selected"
        if not setting.privatizer.startswith("gaussian"):
            yield "setting", ("clip_norm",), "setting.privatizer is not gaussian"
            if setting.labels != "kept" and setting.exempt != "selected":
                yield "setting", ("delta",), "nothing in setting has a delta"
        for section, keys in OF_A_LOOP.items():
            yield section, keys, "setting.kind is split"
        yield "method", ("clip_quantile", "clip_share"), "setting.kind is split"


def _named(section: Any, prefix: str) -> tuple[str, ...]:
    return tuple(key for key in type(section).model_fields if key.startswith(prefix))

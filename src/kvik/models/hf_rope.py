"""Rotary embedding as config.json describes it."""

from __future__ import annotations

from collections.abc import Mapping

from kvik.models import config_checks as check
from kvik.models.config import RopeConfig
from kvik.models.config_fields import Fields, short
from kvik.models.rope import yarn_attention_factor

__all__ = ["rope_from_hf"]


def rope_from_hf(fields: Fields | None, top: Fields, theta: float, context: int) -> RopeConfig:
    """What `rope_parameters`, or in older files `rope_scaling`, holds.

    fields: that object; None where the file has none. top: the file's own fields.
    theta: the base where the object names none. context: the model's, for what is relative to it.
    """
    if fields is None:
        return RopeConfig(theta=theta)
    fields.refuse_unless({"partial_rotary_factor": 1.0})
    theta = fields.real_or_none("rope_theta", 1.0, check.MAX_THETA) or theta
    kind_key = "rope_type" if fields.get("rope_type") is not None else "type"
    kind = fields.text_or_none(kind_key) or "default"
    if kind == "default":
        for key in ("full_attention", "sliding_attention"):
            if isinstance(fields.get(key), Mapping):
                raise fields.error(key, "scales by layer type, which is not supported here")
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=fields.real("factor", check.MIN_FACTOR, check.MAX_FACTOR))
    original = top.integer_or_none("original_max_position_embeddings", 1, check.MAX_CONTEXT)
    if original is None:
        original = fields.integer_or_none("original_max_position_embeddings", 1, check.MAX_CONTEXT)
    if kind == "llama3":
        return _llama3(fields, theta, original or context)
    if kind == "yarn":
        return _yarn(fields, theta, original or context, context)
    raise fields.error(kind_key, f"{short(kind)} is not supported; default, linear, llama3 and yarn are")


def _llama3(fields: Fields, theta: float, original: int) -> RopeConfig:
    low = fields.real("low_freq_factor", 0.0, check.MAX_FACTOR)
    high = fields.real("high_freq_factor", 0.0, check.MAX_FACTOR)
    if high <= low:
        raise fields.error("high_freq_factor", f"is {high:g}, not above low_freq_factor {low:g}")
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=fields.real("factor", check.MIN_FACTOR, check.MAX_FACTOR),
        original_context=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(fields: Fields, theta: float, original: int, context: int) -> RopeConfig:
    fields.refuse_unless({"truncate": True})
    factor = fields.real_or_none("factor", check.MIN_FACTOR, check.MAX_FACTOR) or context / original
    attention = fields.real_or_none("attention_factor", check.MIN_FACTOR, check.MAX_FACTOR)
    mscale, all_dim = (fields.real_or_none(key, -1.0, check.MAX_FACTOR) for key in ("mscale", "mscale_all_dim"))
    if attention is None and mscale and all_dim:
        attention = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, all_dim)
    return check.yarn(fields, theta, factor, original, attention, ("beta_fast", "beta_slow"))

"""What both kinds of configuration are checked for: bounds, heads that divide, a family that Kvik has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from kvik.models.config import RopeConfig
from kvik.models.config_fields import Fields, short

__all__ = ["divided", "even", "experts", "known", "kv_heads", "yarn"]

MAX_WIDTH = 1 << 20
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_SIZE = 1024
MAX_VOCAB = 1 << 20
MAX_CONTEXT = 1 << 28
MAX_EXPERTS = 1024
MAX_EXPERTS_OF_ALL_LAYERS = 1 << 16
MIN_FACTOR = 0.01  # of what a context is stretched by; a real() bound is exclusive
MAX_FACTOR = 65536.0
MAX_THETA = 1e15


def known(fields: Fields, key: str, name: str | None, names: Iterable[str]) -> str:
    """The name, which must be one of names."""
    if name is None:
        raise fields.error(key, "is missing")
    known_names = sorted(names)
    if name not in known_names:
        nearest = difflib.get_close_matches(name, known_names, 1, 0.0)[0]
        raise fields.error(
            key,
            f"{short(name)} is not supported; nearest is {nearest!r} of: {', '.join(known_names)}. "
            'Kvik never falls back to another implementation such as executor="transformers"',
        )
    return name


def kv_heads(fields: Fields, key: str, heads: int) -> int:
    """Key/value heads; as many as query heads where the file says nothing."""
    count = fields.per_layer(key, MAX_HEADS)
    if count is None:
        return heads
    if heads % count:
        raise fields.error(key, f"is {count}, which does not divide the {heads} query heads")
    return count


def divided(fields: Fields, key: str, width: int, heads_key: str, heads: int) -> int:
    """width / heads."""
    if width % heads:
        raise fields.error(key, f"is {width}, not a multiple of {heads_key} {heads}")
    return width // heads


def even(fields: Fields, key: str, head_size: int) -> int:
    """head_size, which rotary embedding halves."""
    if head_size % 2 or head_size > MAX_HEAD_SIZE:
        raise fields.error(key, f"gives heads of size {head_size}; it must be even and at most {MAX_HEAD_SIZE}")
    return head_size


def experts(fields: Fields, count_key: str, used_key: str, layers: int) -> dict[str, int]:
    """The fields of ModelConfig that count experts."""
    count = fields.integer(count_key, 1, MAX_EXPERTS)
    if count * layers > MAX_EXPERTS_OF_ALL_LAYERS:  # each is a tensor of its own to look for
        raise fields.error(
            count_key, f"is {count} in {layers} layers; {MAX_EXPERTS_OF_ALL_LAYERS} experts are the most"
        )
    return {"num_experts": count, "experts_used": fields.integer(used_key, 1, count)}


def yarn(
    fields: Fields, theta: float, factor: float, original: int | None, attention: float | None, betas: tuple[str, str]
) -> RopeConfig:
    """YaRN, with the keys of its band edges, fast and slow."""
    if not MIN_FACTOR < factor <= MAX_FACTOR:  # one that follows from two contexts
        raise fields.error("factor", f"must be above {MIN_FACTOR:g} and at most {MAX_FACTOR:g}, follows as {factor:g}")
    fast = fields.real_or_none(betas[0], 0.0, MAX_FACTOR) or 32.0
    slow = fields.real_or_none(betas[1], 0.0, MAX_FACTOR) or 1.0
    if fast <= slow:
        raise fields.error(betas[0], f"is {fast:g}, not above {betas[1]} {slow:g}")
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=attention,
    )

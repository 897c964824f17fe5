"""The KV cache of a sequence: formats of keys and values, and what is evicted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from kvik.errors import ParameterError
from kvik.params.checks import choose, flag, integer
from kvik.params.eviction import Policy, Scorer, parse_policy, policy_name, policy_of, policy_text

__all__ = ["GROUP_SIZES", "KV_FORMATS", "CacheParams", "KVFormat", "cache_params", "kv_text", "parse_kv"]

KVFormat = Literal["f32", "f16", "bf16", "int8", "int4"]
"""In the order of the native core's numbers."""
KV_FORMATS: tuple[KVFormat, ...] = get_args(KVFormat)
GROUP_SIZES = (16, 32, 64, 128)
MAX_KEEP_FIRST = 1024
LAYERS = ("uniform", "pyramid")
HEADS = ("uniform", "ada")

_ALIASES: dict[str, KVFormat] = {
    "fp32": "f32", "float32": "f32", "fp16": "f16", "float16": "f16", "bfloat16": "bf16", "i8": "int8", "i4": "int4",
}  # fmt: skip
_BY_BITS: dict[str, KVFormat] = {"32": "f32", "16": "f16", "8": "int8", "4": "int4"}
_BITS = {name: bits for bits, name in _BY_BITS.items()}


@dataclass(frozen=True, kw_only=True)
class CacheParams:
    """How a sequence's keys and values are kept.

    Attributes:
        k, v: format of keys and of values: "f32", "f16", "bf16", or in integers "int8" (symmetric) or "int4" (two a byte).
        group_size: tokens that are packed together where a format has integers, 16, 32, 64 or 128.
        keep_first: first tokens that stay out of integers, 0 to 1,024.
        rotate: queries and keys go through a Hadamard transform, which spreads channels of large numbers over all.
        policy: which tokens are kept: a policy, its text ("snapkv:budget=25%"), or None, which keeps all.
        layers: how a scorer's budget is spread over layers: "uniform" or "pyramid" (more below, less above; Cai et al.
            2024, arXiv:2406.02069).
        heads: how it is spread over a layer's KV heads: "uniform" or "ada" (where scores are highest; Feng et al. 2024,
            arXiv:2407.11550).
    """

    k: KVFormat = "f16"
    v: KVFormat = "f16"
    group_size: int = 64
    keep_first: int = 4
    rotate: bool = False
    policy: Policy | str | None = None
    layers: Literal["uniform", "pyramid"] = "uniform"
    heads: Literal["uniform", "ada"] = "uniform"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", choose("k", self.k, KV_FORMATS, _ALIASES))
        object.__setattr__(self, "v", choose("v", self.v, KV_FORMATS, _ALIASES))
        integer("group_size", self.group_size, 1)
        if self.group_size not in GROUP_SIZES:
            raise ParameterError(f"group_size must be 16, 32, 64 or 128, got {self.group_size}")
        integer("keep_first", self.keep_first, 0, MAX_KEEP_FIRST)
        flag("rotate", self.rotate)
        object.__setattr__(self, "policy", policy_of(self.policy))
        choose("layers", self.layers, LAYERS)
        choose("heads", self.heads, HEADS)
        if not self.packed:
            for name in ("group_size", "keep_first"):
                if (value := getattr(self, name)) != getattr(CacheParams, name):
                    raise ParameterError(f"{name} {value} needs k or v in int8 or int4, they are {self.k} and {self.v}")
        for name in ("layers", "heads"):
            if (value := getattr(self, name)) != "uniform" and self.scorer is None:
                has = "there is none" if self.policy is None else f"{policy_name(self.policy)} has none"  # type: ignore[arg-type]
                raise ParameterError(f"{name} {value!r} needs a policy with a budget, {has}")
        if self.heads == "ada" and self.scorer is not None and policy_name(self.scorer) == "tova":
            raise ParameterError("heads 'ada' cannot go with tova: its heads keep the same tokens")

    @property
    def packed(self) -> bool:
        """Whether keys or values are in integers."""
        return "int" in self.k or "int" in self.v

    @property
    def scorer(self) -> Scorer | None:
        """The policy where it is one that ranks slots."""
        return self.policy if isinstance(self.policy, Scorer) else None

    @property
    def kv(self) -> str:
        """Both formats as `parse_kv` takes them."""
        return kv_text(self.k, self.v)

    @property
    def evict(self) -> str:
        """Policy and allocators as `cache_params` takes them; "none" keeps all."""
        text = policy_text(self.policy)  # type: ignore[arg-type] # no str any more
        for name in ("layers", "heads"):
            if (value := getattr(self, name)) != "uniform":
                text += f",{name}={value}"
        return text

    @property
    def text(self) -> str:
        """For people: "k8v4, rotated, snapkv:budget=25%,…"; what is as it is by default is left out."""
        shown = [self.kv]
        if self.group_size != CacheParams.group_size:
            shown.append(f"groups of {self.group_size}")
        if self.keep_first != CacheParams.keep_first:
            shown.append(f"first {self.keep_first} kept")
        if self.rotate:
            shown.append("rotated")
        if self.policy is not None:
            shown.append(self.evict)
        return ", ".join(shown)

    def check(self, prompt_tokens: int | None) -> None:
        """ParameterError where the policy makes no sense for a prompt of so many tokens (None: a text that is scored)."""
        if self.policy is not None:
            self.policy.check(prompt_tokens)  # type: ignore[union-attr] # no str any more

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it; the policy as text, or None."""
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        found["policy"] = None if self.policy is None else policy_text(self.policy)  # type: ignore[arg-type]
        return found

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> CacheParams:
        """What `as_dict` wrote, or some of it; ParameterError names an unknown field, with the nearest known."""
        if not isinstance(given, Mapping):
            raise ParameterError(f"cache must be an object, got {given!r:.80}")
        known = [field.name for field in fields(cls)]
        return cls(**{choose("a field of cache", name, known): value for name, value in given.items()})


def parse_kv(text: str) -> tuple[KVFormat, KVFormat]:
    """Formats of keys and values: "int8" for both, "k8v4" by bits (32 and 16: f32 and f16), "bf16/int4" by name."""
    if not isinstance(text, str):
        raise ParameterError(f"kv must be a string, got {text!r:.80}")
    given = text.strip().lower()
    if bits := re.fullmatch(r"k(\d{1,3})v(\d{1,3})", given):
        return _by_bits(text, bits[1]), _by_bits(text, bits[2])
    if "/" in given:
        k, _, v = given.partition("/")
        return choose("kv (keys)", k, KV_FORMATS, _ALIASES), choose("kv (values)", v, KV_FORMATS, _ALIASES)
    both = choose("kv", given, (*KV_FORMATS, "k8v4"), _ALIASES)
    return both, both  # type: ignore[return-value] # k8v4 is taken above


def _by_bits(text: str, bits: str) -> KVFormat:
    if bits not in _BY_BITS:
        raise ParameterError(f"kv takes 32, 16, 8 or 4 bits, got {text!r}")
    return _BY_BITS[bits]


def kv_text(k: KVFormat, v: KVFormat) -> str:
    """The shortest text that `parse_kv` makes these formats of."""
    if k == v:
        return k
    return f"k{_BITS[k]}v{_BITS[v]}" if k in _BITS and v in _BITS else f"{k}/{v}"


def cache_params(kv: str | None, evict: str | None, base: CacheParams) -> CacheParams:
    """`base` with formats and eviction as texts say; None leaves them as they are.

    evict says all about eviction: a policy's text, among whose fields "layers" and "heads" may stand
    ("snapkv:budget=25%,layers=pyramid,heads=ada"); what it does not say is as by default. group_size and keep_first are those
    of `base` while there are integers.
    """
    changed: dict[str, Any] = {}
    if kv is not None:
        changed["k"], changed["v"] = parse_kv(kv)
        if not any("int" in name for name in (changed["k"], changed["v"])):
            changed |= {"group_size": CacheParams.group_size, "keep_first": CacheParams.keep_first}
    if evict is not None:
        changed |= _evict(evict)
    return replace(base, **changed)


def _evict(text: str) -> dict[str, Any]:
    """policy, layers and heads of a text."""
    if not isinstance(text, str):
        raise ParameterError(f"evict must be a string, got {text!r:.80}")
    found: dict[str, Any] = {}
    name, colon, rest = text.partition(":")
    mine = []
    for part in rest.split(","):
        field, equals, value = (piece.strip() for piece in part.partition("="))
        if equals and field in ("layers", "heads"):
            if field in found:
                raise ParameterError(f"policy {name.strip()}: {field} is given twice")
            found[field] = choose(field, value, LAYERS if field == "layers" else HEADS)
        else:
            mine.append(part)
    found["policy"] = parse_policy(name + colon + ",".join(mine))
    return {"layers": "uniform", "heads": "uniform"} | found

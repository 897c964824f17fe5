"""Settings of a KV cache that are measured, by name: formats as `--kv` takes them, policies as `--evict` does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from bench import BenchError

__all__ = ["FORMATS", "FULL", "QUALITY_TARGETS", "SCORERS", "SHARES", "KvSetting", "evicting", "formats", "nominal"]

FULL = "f16"
FORMATS = ("int8", "k8v4", "int4")
SCORERS = ("h2o", "snapkv", "tova", "keydiff", "expectedattention")
ALLOCATED = ("snapkv,layers=pyramid", "snapkv,heads=ada", "keydiff,heads=ada")
"""A scorer with another allocator, as its name is written here: the scorer, then fields."""
SHARES = (50, 25, 10)
"""Of the tokens, in percent."""
BOTH = "int4 + snapkv 25 %"


class QualityTarget(NamedTuple):
    """Bytes over those of f16; perplexity's change in percent; share of predictions with the same best token, percent."""

    bytes: float
    perplexity: float
    top: float


QUALITY_TARGETS: Mapping[str, QualityTarget] = {
    "int8": QualityTarget(0.53, 0.1, 99.0), "k8v4": QualityTarget(0.41, 0.4, 96.0), "int4": QualityTarget(0.32, 1.0, 95.0),
}  # fmt: skip


class KvSetting(NamedTuple):
    """kv: formats. evict: policy as text, "none" for none."""

    kv: str = FULL
    evict: str = "none"


def formats() -> dict[str, KvSetting]:
    return {name: KvSetting(name) for name in (FULL, *FORMATS)}


def evicting(scorers: Iterable[str] = (*SCORERS, *ALLOCATED)) -> dict[str, KvSetting]:
    """Every scorer at every share, and int4 with a quarter of the tokens."""
    found = {}
    for written in scorers:
        name, _, fields = written.partition(",")
        for share in SHARES:
            more = f",{fields}" if fields else ""
            found[f"{written} {share} %"] = KvSetting(FULL, f"{name}:budget={share}%{more}")
    return {**found, BOTH: KvSetting("int4", "snapkv:budget=25%")}


def nominal(name: str) -> float:
    """The share of the tokens in a name of `evicting`."""
    try:
        return float(name.split()[-2]) / 100
    except (IndexError, ValueError) as error:
        raise BenchError(f"{name!r} tells of no share of the tokens") from error

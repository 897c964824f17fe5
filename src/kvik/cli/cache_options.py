"""The options that say how keys and values are kept: the fields of CacheParams, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from kvik.cli.strategy_options import choices, option
from kvik.errors import ParameterError
from kvik.params import GROUP_SIZES, KV_FORMATS, POLICIES, CacheParams, cache_field, cache_params

__all__ = [
    "CACHE_PANEL",
    "EVICT_HELP",
    "KV_HELP",
    "CacheOptions",
    "PackingOptions",
    "cache_of_texts",
    "check_prompt",
    "naming_cache",
]

CACHE_PANEL = "KV cache"
KV_HELP = "Formats of keys and values: f16, bf16, f32, int8, int4, or of each, like k8v4 or bf16/int4."
EVICT_HELP = (
    f"Which tokens are kept: none (evict none), or a policy, {', '.join(POLICIES)}, with its fields, like "
    "snapkv:budget=25%,window=32."
)
complete_kv = choices(*KV_FORMATS, "k8v4")
complete_evict = choices("none", *POLICIES)
_FLAGS = {"group_size": "--kv-group-size", "keep_first": "--kv-keep-first", "rotate": "--kv-rotate",
          "layers": "--kv-layers", "heads": "--kv-heads"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """The fields of CacheParams beside formats and policy; None is what was not given."""

    kv_group_size: Annotated[
        int | None,
        option("--kv-group-size", f"Tokens that int8 and int4 are packed by: {', '.join(map(str, GROUP_SIZES))}.",
               CACHE_PANEL, f"{CacheParams.group_size}", metavar="N"),
    ] = None  # fmt: skip
    kv_keep_first: Annotated[
        int | None,
        option("--kv-keep-first", "First tokens that stay out of int8 and int4, 0 to 1024.", CACHE_PANEL,
               f"{CacheParams.keep_first}", metavar="N"),
    ] = None  # fmt: skip
    kv_rotate: Annotated[
        bool | None,
        option("--kv-rotate/--no-kv-rotate", "Spread large channels of queries and keys (Hadamard) before packing.",
               CACHE_PANEL, "kv-rotate" if CacheParams.rotate else "no-kv-rotate"),
    ] = None  # fmt: skip
    kv_layers: Annotated[
        str | None,
        option("--kv-layers", "How a budget is spread over layers: uniform or pyramid.", CACHE_PANEL,
               CacheParams.layers, metavar="NAME", autocompletion=choices("uniform", "pyramid")),
    ] = None  # fmt: skip
    kv_heads: Annotated[
        str | None,
        option("--kv-heads", "How it is spread over a layer's heads: uniform or ada.", CACHE_PANEL, CacheParams.heads,
               metavar="NAME", autocompletion=choices("uniform", "ada")),
    ] = None  # fmt: skip

    def packing(self) -> dict[str, Any]:
        """What was given, by the names of CacheParams."""
        given = {name: getattr(self, f"kv_{name}") for name in _FLAGS}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Formats and policy of one cache."""

    kv: Annotated[
        str, option("--kv", KV_HELP, CACHE_PANEL, metavar="FORMAT", autocompletion=complete_kv)
    ] = CacheParams().kv  # fmt: skip
    evict: Annotated[
        str, option("--evict", EVICT_HELP, CACHE_PANEL, metavar="POLICY", autocompletion=complete_evict)
    ] = CacheParams().evict  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CacheOptions(PackingOptions, TextOptions):
    """All of one cache. kv_flag: what the option of its formats is called."""

    kv_flag: ClassVar[str] = "--kv"

    def cache(self) -> CacheParams:
        """Raises ParameterError naming the option and its range."""
        return cache_of_texts(self.kv, self.evict, self.packing(), self.kv_flag)


def cache_of_texts(kv: str | None, evict: str | None, more: dict[str, Any], kv_flag: str = "--kv") -> CacheParams:
    """Of --kv, --evict and, by the names of CacheParams, what was given beside them; errors name the options."""
    try:
        found = cache_params(kv, None, CacheParams())
    except ParameterError as error:
        raise ParameterError(kv_flag + str(error).removeprefix("kv")) from None
    try:
        found = cache_params(None, evict, found)
    except ParameterError as error:
        raise ParameterError(f"--evict: {error}") from None
    for name in ("layers", "heads"):
        said, other = getattr(found, name), more.get(name)
        if other is not None and said not in (CacheParams.layers, other):
            raise ParameterError(f"{_FLAGS[name]} is {other} and --evict says {name}={said}; give one of them")
    try:
        return replace(found, **more)
    except ParameterError as error:
        name, blank, rest = str(error).partition(" ")
        said = _FLAGS.get(name, name) + blank + rest
        raise ParameterError(said.replace("needs k or v in int8 or int4", f"needs {kv_flag} int8 or int4")) from None


@contextmanager
def naming_cache() -> Iterator[None]:
    """Where a model cannot have a cache, name the option that asks for it."""
    try:
        yield
    except ParameterError as error:
        field = cache_field(str(error))
        if field is None:
            raise
        raise ParameterError(f"--{field}: {error}") from None


def check_prompt(cache: CacheParams, prompt_tokens: int | None, name: str = "--evict") -> None:
    """Refuse a policy that makes no sense for a prompt of so many tokens (None: a text), under the option's name."""
    try:
        cache.check(prompt_tokens)
    except ParameterError as error:
        raise ParameterError(f"{name}: {error}") from None

"""The tables of a sequence's cache and their bytes: the allocator, the planner and the reports all ask here.

(layer, KV head) pairs that forget alike are a *group*: layers of the same window at first, after an eviction by layer or by
head those that keep as many tokens. A sequence has, for each group, a table of full blocks and, with a packed format, one of
packed pages behind it. What the bytes of a block are is `PageFormat.share_bytes`, one (layer, head) of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple, Protocol

from kvik.errors import ParameterError
from kvik.ops import Sizes
from kvik.ops.pages import ADDRESS_BYTES, BLOCK_TOKENS, RECENT, CacheLayout, PageFormat, is_packed
from kvik.params.cache import CacheParams, KVFormat, kv_text, parse_kv
from kvik.params.eviction import StreamingLLM, policy_name

__all__ = ["BLOCK_TOKENS", "CacheShape", "KVLayout", "LayerGroup", "Places", "Table", "blocks_for", "kv_layout"]


def blocks_for(tokens: int) -> int:
    """Full blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class CacheShape(Sizes, Protocol):
    """What the cache must know of a model's configuration."""

    @property
    def windows(self) -> tuple[int | None, ...]: ...
    @property
    def context_length(self) -> int: ...
    @property
    def rope(self) -> object | None:
        """None where positions are learned."""
        ...


class Places(NamedTuple):
    """Which places of a table have blocks: those before `head`, and from `first` to `count`."""

    head: int
    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count

    @property
    def held(self) -> int:
        return min(self.head, self.first) + self.count - self.first

    @property
    def taken(self) -> Iterator[int]:
        """Those with blocks, in order."""
        return chain(range(min(self.head, self.first)), range(self.first, self.count))


class Table(NamedTuple):
    """One table of a sequence. tokens: that a block holds; steps: its bytes, in steps of 64."""

    group: int
    packed: bool
    tokens: int
    steps: int


@dataclass(frozen=True)
class LayerGroup:
    """(layer, KV head) pairs that forget alike, and which of their blocks are there; n counts tokens of the tables.

    Attributes:
        layout: as executors know it.
        units: the pairs, by layer, then head.
        window: slots a row sees, its own included; 0 sees all. `own` says whether it is the layers' own: then no sinks.
    """

    layout: CacheLayout
    units: tuple[tuple[int, int], ...]
    window: int
    own: bool

    @cached_property
    def packs(self) -> bool:
        """Whether some row reads packed pages: the last RECENT slots never are."""
        return self.layout.packed is not None and (not self.window or self.window > RECENT)

    @cached_property
    def forgets(self) -> bool:
        """Whether blocks are given up while tokens come."""
        return self.packs or bool(self.window)

    @cached_property
    def _keep(self) -> int:
        return self.layout.keep // BLOCK_TOKENS

    def _seen(self, n: int) -> int:
        """The first slot behind the sinks that rows from slot n on see."""
        return max(0, n + 1 - self.window) if self.window else 0

    def full(self, n: int) -> Places:
        """Full blocks that are there after n tokens: what rows from slot n on see in full, or pack."""
        count = blocks_for(n)
        if not self.forgets:
            return Places(0, 0, count)
        seen = self._seen(n)
        head = self._keep if not self.own or (self.packs and seen < self.layout.keep) else 0
        first = self.layout.packed_end(n - 1) if self.packs else seen
        return Places(min(head, count), min(first // BLOCK_TOKENS, count), count)

    @cached_property
    def first_page(self) -> int:
        """The first packed page that has slots from `keep` on: nobody reads those before."""
        return 0 if self.layout.packed is None else self.layout.keep // self.layout.packed.tokens

    def page_count(self, n: int) -> int:
        """Places of the table of packed pages after n tokens."""
        return 0 if self.layout.packed is None else self.layout.packed_end(n - 1) // self.layout.packed.tokens

    def pages(self, n: int) -> Places:
        """Packed pages that are there after n tokens: those that rows from slot n on see."""
        count, first = self.page_count(n), self.first_page
        if not self.packs:
            first = count
        elif self.window:
            assert self.layout.packed is not None
            first = max(first, self._seen(n) // self.layout.packed.tokens)
        return Places(0, min(first, count), count)

    def most(self, tokens: int, chunk: int) -> tuple[int, int]:
        """Most full blocks and packed pages at once of a sequence of `tokens` tokens, computed at most `chunk` at a time.

        A row's window and, in full, what is not packed yet, and the whole chunk are there while it is computed.
        """
        blocks, pages = blocks_for(tokens), 0
        if self.packs:
            assert self.layout.packed is not None
            each = self.layout.packed.tokens
            blocks = min(blocks, self._keep + blocks_for(RECENT + each - 1 + chunk))
            pages = max(0, self.page_count(tokens) - self.first_page)
            if self.window:
                pages = min(pages, -(-(self.window + chunk) // each) + 1)
        elif self.window:
            blocks = min(blocks, blocks_for(self.window + chunk) + 1 + (0 if self.own else self._keep))
        return blocks, pages


@dataclass(frozen=True)
class KVLayout:
    """Tables and bytes of a sequence's cache.

    Attributes:
        executor: what executors know of it; `Executor.register` numbers it.
        groups: in the order of the executor's.
        kv_heads, head_size: of the model.
        k, v: the formats asked for.
        by: how finely the groups of layers that see all are split by now.
        layers, heads: how a scorer's budget is spread, which decides how they are split by the first eviction.
    """

    executor: CacheLayout
    groups: tuple[LayerGroup, ...]
    kv_heads: int
    head_size: int
    k: KVFormat
    v: KVFormat
    by: str = "window"
    layers: str = "uniform"
    heads: str = "uniform"

    @cached_property
    def format(self) -> str:
        """Both formats, as `parse_kv` takes them."""
        return kv_text(self.k, self.v)

    @cached_property
    def name(self) -> str:
        """What of it decides a block's bytes beside model and tokens: for keys of the prefix index."""
        e = self.executor
        groups = "" if e.packed is None else f" in groups of {e.packed.tokens}"
        streaming = f" {e.sinks} sinks and {e.window}" if e.window else ""
        return f"{self.k}/{self.v}{groups} but {e.keep}{' rotated' if e.rotate else ''}{streaming}"

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """Of a sequence, in the order of `CacheLayout`."""
        found = []
        for number, units in enumerate(self.executor.units):
            for page in (self.executor.full, self.executor.packed):
                if page is not None:
                    steps = units * page.share_bytes(self.head_size) // ADDRESS_BYTES
                    found.append(Table(number, page is not self.executor.full, page.tokens, steps))
        return tuple(found)

    @cached_property
    def forgets(self) -> bool:
        """Whether blocks are given up while tokens come: not every beginning of a sequence can be gone back to."""
        return any(group.forgets for group in self.groups)

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers, packed where they ever are; rounded up."""
        total = 0.0
        for table in self.tables:
            if table.packed == self.groups[table.group].packs:
                total += table.steps * ADDRESS_BYTES / table.tokens
        return int(-(-total // 1))

    def held_bytes(self, blocks: Iterable[int]) -> int:
        """Bytes of so many blocks of each table."""
        return sum(count * table.steps for count, table in zip(blocks, self.tables, strict=True)) * ADDRESS_BYTES

    def by_size(self, blocks: Iterable[int]) -> Counter[int]:
        """So many blocks of each table, by their size in steps of 64 bytes."""
        found = Counter[int]()
        for count, table in zip(blocks, self.tables, strict=True):
            if count:
                found[table.steps] += count
        return found

    def places(self, tokens: int) -> Iterator[tuple[int, Places, int]]:
        """Each table's number, where it has blocks after so many tokens, and the tokens of a block."""
        for number, table in enumerate(self.tables):
            group = self.groups[table.group]
            yield number, group.pages(tokens) if table.packed else group.full(tokens), table.tokens

    def blocks_at(self, tokens: int) -> tuple[int, ...]:
        """Blocks, by table, that a sequence holds after `tokens` tokens."""
        return tuple(places.held for _, places, _ in self.places(tokens))

    def bytes_at(self, tokens: int) -> int:
        """Bytes that a sequence by itself holds after `tokens` tokens."""
        return self.held_bytes(self.blocks_at(tokens))

    def sequence_blocks(self, tokens: int, chunk: int) -> tuple[int, ...]:
        """Most blocks, by table, that a sequence of `tokens` tokens holds at once, computed at most `chunk` at a time."""
        return tuple(self.groups[table.group].most(tokens, chunk)[table.packed] for table in self.tables)

    def evicted(self, layers: str, heads: str) -> KVLayout:
        """That of a sequence after its first event, where budgets are spread so: the same where both are "uniform"."""
        if self.by != "window" or layers == heads == "uniform":
            return self
        return self._by_layer if heads == "uniform" else self._by_head

    @property
    def after_event(self) -> KVLayout:
        """`evicted` as its own budgets are spread."""
        return self.evicted(self.layers, self.heads)

    @cached_property
    def _by_layer(self) -> KVLayout:
        return self._split("layer")

    @cached_property
    def _by_head(self) -> KVLayout:
        return self._split("head")

    def _split(self, by: str) -> KVLayout:
        """Each layer without a window, or each of its heads, is a group of its own."""
        parts: list[tuple[list[tuple[int, int]], int]] = []
        for group in self.groups:
            if group.own:
                parts.append((list(group.units), group.window))
                continue
            own: dict[tuple[int, ...], list[tuple[int, int]]] = {}
            for unit in group.units:
                own.setdefault(unit if by == "head" else unit[:1], []).append(unit)
            parts += [(units, 0) for units in own.values()]
        executor, groups = _grouped(self.executor, parts)
        return replace(self, executor=executor, groups=groups, by=by)


def _grouped(
    executor: CacheLayout, parts: Sequence[tuple[list[tuple[int, int]], int]]
) -> tuple[CacheLayout, tuple[LayerGroup, ...]]:
    """The layout with groups of these (layer, head) pairs, each with its layers' own window (0: none)."""
    place = {unit: number for number, (units, _) in enumerate(parts) for unit in units}
    rows: dict[int, list[int]] = {}
    for layer, head in sorted(place):
        rows.setdefault(layer, []).append(place[layer, head])
    executor = replace(executor, group_of=tuple(tuple(row) for row in rows.values()))
    return executor, tuple(
        LayerGroup(executor, tuple(units), window or executor.window, bool(window)) for units, window in parts
    )


def kv_layout(shape: CacheShape, params: CacheParams | str = "f16") -> KVLayout:
    """The layout of a model's cache: a group for each window there is, layers that see all first.

    ParameterError where the model cannot have what is asked for. params: or the formats' text.
    """
    if isinstance(params, str):
        k, v = parse_kv(params)
        params = CacheParams(k=k, v=v)
    _check(shape, params)
    packs = is_packed(params.k) or is_packed(params.v)
    full = PageFormat(_unpacked(params.k), _unpacked(params.v), BLOCK_TOKENS)
    packed = PageFormat(params.k, params.v, params.group_size) if packs else None
    streaming = params.policy if isinstance(params.policy, StreamingLLM) else None
    sinks, window = (0, 0) if streaming is None else (streaming.sinks, streaming.window)
    keep = blocks_for(max(sinks, params.keep_first if packs else 0)) * BLOCK_TOKENS
    by_window: dict[int, list[tuple[int, int]]] = {}
    for layer, own in enumerate(shape.windows):
        by_window.setdefault(own or 0, []).extend((layer, head) for head in range(shape.num_kv_heads))
    bare = CacheLayout(full, packed, (), keep, params.rotate, sinks, window)
    executor, groups = _grouped(bare, [(units, own) for own, units in sorted(by_window.items())])
    return KVLayout(
        executor,
        groups,
        shape.num_kv_heads,
        shape.head_size,
        params.k,
        params.v,
        layers=params.layers,
        heads=params.heads,
    )


def _unpacked(kv: KVFormat) -> KVFormat:
    return "f16" if is_packed(kv) else kv


def _check(shape: CacheShape, params: CacheParams) -> None:
    """Refuse, by name, what this model cannot have."""
    for side, kv in (("k", params.k), ("v", params.v)):
        if kv == "int4" and shape.head_size % 2:
            raise ParameterError(f"{side} is int4, two numbers a byte; this model's heads have {shape.head_size}")
    if params.policy is None:
        return
    assert not isinstance(params.policy, str)
    name = policy_name(params.policy)
    if all(shape.windows):
        raise ParameterError(f"policy is {name}; all layers of this model have a window already and forget by it")
    if not isinstance(params.policy, StreamingLLM):
        return
    if shape.rope is None:
        raise ParameterError(f"policy is {name}, which moves rotary positions; this model's are learned")
    sinks, window = params.policy.sinks, params.policy.window
    if sinks + window > shape.context_length:
        raise ParameterError(
            f"{name} sees {sinks} sinks + {window} tokens; the model's context is {shape.context_length}"
        )

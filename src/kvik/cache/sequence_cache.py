"""A sequence's place in the cache: its block tables, and the verbs append, fork, truncate, evict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.cache.block_table import FREED, BlockCopy, BlockTable, GroupTables, group_tables
from kvik.cache.blocks import BlockPool
from kvik.cache.layout import BLOCK_TOKENS, KVLayout, Places
from kvik.cache.prefix import BlockKey, PrefixIndex
from kvik.errors import KvikError
from kvik.ops import CacheView
from kvik.ops.pages import RECENT

__all__ = ["FREED", "BlockCopy", "BlockTable", "CacheArrays", "SequenceCache", "held_together"]


class CacheArrays(NamedTuple):
    """What a pass needs of a sequence, table by table: valid until the cache changes.

    blocks: addresses, -1 where there is none. lengths: places of each table. shifts: slots evicted from each.
    """

    blocks: NDArray[np.int32]
    lengths: tuple[int, ...]
    shifts: tuple[int, ...]


class SequenceCache:
    """What one sequence holds of the cache.

    Attributes:
        pool: whose blocks they are.
        layout: of its tables.
        tables: in the order of the layout.
        num_tokens: slots in use, evicted ones counted.
        evicted_at: num_tokens at the last event, 0 before the first: it cannot go back further.
    """

    def __init__(self, pool: BlockPool, layout: KVLayout) -> None:
        self.pool, self.layout = pool, layout
        self._groups: list[GroupTables] = []
        at = 0
        for rule in layout.groups:
            each = 1 if layout.executor.packed is None else 2
            self._groups.append(group_tables(pool, rule, layout.tables[at : at + each]))
            at += each
        self._begin()

    def _begin(self) -> None:
        """Empty, whatever the tables were."""
        self.num_tokens = self.evicted_at = 0
        self._registered = 0  # full blocks that were shown to the index
        self._arrange()

    def _arrange(self) -> None:
        """The tables are others, or have other shifts."""
        self.tables: list[BlockTable] = [table for group in self._groups for table in group.tables]
        self._packs = self.layout.executor.packed is not None
        self._windowed = [group for group in self._groups if group.rule.window]
        # those some of whose full blocks may have been packed since the last `free_unseen`
        self._loosened = [group for group in self._groups if group.rule.packs and not group.rule.window]
        due: dict[int, list[GroupTables]] = {}
        for group in self._groups:
            due.setdefault(group.shift % BLOCK_TOKENS, []).append(group)
        self._due = tuple(due.items())  # groups by the slots, modulo 16, at which they need a block
        self._touch()
        self._share()

    def _touch(self) -> None:
        """Blocks have changed."""
        self._arrays: CacheArrays | None = None
        self._held: int | None = None

    def _share(self) -> None:
        """Blocks in use in part may be shared, or found by what they held."""
        self._own, self._room = False, 0

    # ---- what it holds

    @property
    def forgets(self) -> bool:
        """Whether `free_unseen` ever frees: then not every beginning can be gone back to."""
        return self.layout.forgets

    @property
    def held_blocks(self) -> list[int]:
        """Blocks held, by table."""
        return [table.num_held for table in self.tables]

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks held, shared ones included."""
        if self._held is None:
            self._held = self.layout.held_bytes(self.held_blocks)
        return self._held

    @property
    def num_held(self) -> int:
        """Blocks held, in all tables."""
        return sum(table.num_held for table in self.tables)

    @property
    def unused_slots(self) -> int:
        """Slots of last full blocks that nothing lies in yet, in all tables."""
        return sum((residue - self.num_tokens) % BLOCK_TOKENS * len(groups) for residue, groups in self._due)

    @property
    def tokens_kept(self) -> float:
        """Slots that lie in some block, mean over layers and KV heads."""
        sizes = self.layout.executor.units
        kept = sum(group.tokens_kept(self.num_tokens) * n for group, n in zip(self._groups, sizes, strict=True))
        return kept / sum(sizes)

    @property
    def num_full(self) -> int:
        """Blocks of 16 tokens that are complete, before any eviction."""
        return self.num_tokens // BLOCK_TOKENS

    def held(self) -> Iterator[int]:
        """Everything held."""
        return chain.from_iterable(table.held() for table in self.tables)

    def bytes_of(self, blocks: Iterable[int]) -> int:
        """Bytes of blocks that are held."""
        return self.pool.bytes_of(blocks)

    def bytes_of_counts(self, blocks: Iterable[int]) -> int:
        """Bytes of so many blocks of each table."""
        return self.layout.held_bytes(blocks)

    @property
    def arrays(self) -> CacheArrays:
        """Its tables, for a pass."""
        if self._arrays is None:
            tables = self.tables
            blocks = tables[0].blocks if len(tables) == 1 else np.concatenate([table.blocks for table in tables])
            shifts = tuple(group.shift for group in self._groups for _ in group.tables)
            self._arrays = CacheArrays(blocks, tuple([table.count for table in tables]), shifts)
        return self._arrays

    def view(self, layout: int) -> CacheView:
        """Its tables, outside a pass. layout: its layout's number with the executor."""
        blocks, lengths, shifts = self.arrays
        spans = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=spans[1:])
        return CacheView(layout, blocks.copy(), spans, np.array(shifts, np.int32), self.num_tokens)

    # ---- append

    def _untouched(self, residue: int, tokens: int) -> bool:
        """Whether so many more tokens need nothing of the groups with this residue: they fit the last block, and none is packed."""
        used = (self.num_tokens - residue) % BLOCK_TOKENS
        return self._own and used > 0 and used + tokens <= BLOCK_TOKENS - self._packs

    def can_append(self, tokens: int) -> bool:
        """Whether the pool has the blocks that `append(tokens)` takes: new ones, and copies of last ones that are shared."""
        if tokens <= self._room:
            return True
        needs, end = Counter[int](), self.num_tokens + tokens
        for residue, groups in self._due:
            if self._untouched(residue, tokens):
                continue
            for group in groups:
                blocks, pages = group.more(end)
                if not self._own:
                    blocks += group.last_is_shared(self.num_tokens)
                if blocks:
                    needs[group.full.steps] += blocks
                if pages and group.pages is not None:
                    needs[group.pages.steps] += pages
        return not needs or self.pool.can_take(needs)

    def most_to_append(self, tokens: int, chunk: int) -> list[int]:
        """Blocks, by table, that `tokens` more slots take at most at once, computed at most `chunk` at a time."""
        end = self.num_tokens + tokens
        found = []
        for group in self._groups:
            most = group.rule.most(end - group.shift, chunk)
            both = [min(more, bound) for more, bound in zip(group.more(end), most, strict=True)]
            found += both[: len(group.tables)]
        return found

    def append(self, tokens: int, copies: list[BlockCopy]) -> None:
        """Make room for `tokens` more slots and count them as used; what must be copied first is added to `copies`."""
        if tokens <= self._room:
            self.num_tokens += tokens
            self._room -= tokens
            return
        begin, end = self.num_tokens, self.num_tokens + tokens
        due = [groups for residue, groups in self._due if not self._untouched(residue, tokens)]
        self.num_tokens = end
        self._touch()
        for group in chain.from_iterable(due):
            if not self._own and (copy := group.make_writable(begin)) is not None:
                copies.append(copy)
            if group.grow(end) and not group.rule.window:
                self._loosened.append(group)
        self._own = True
        room = min((residue - end) % BLOCK_TOKENS for residue, _ in self._due)
        self._room = max(0, room - self._packs)

    def free_unseen(self) -> None:
        """Free what no row from slot num_tokens on sees, and full blocks that were packed; after a pass was computed."""
        dropped = False
        for group in self._windowed:
            dropped |= group.drop_unseen(self.num_tokens)
        if self._loosened:
            for group in self._loosened:
                dropped |= group.drop_unseen(self.num_tokens)
            self._loosened = []
        if dropped:
            self._touch()

    # ---- fork, truncate, free

    def fork(self, num_tokens: int) -> SequenceCache:
        """Another sequence's cache with the same first `num_tokens` slots; it shares their blocks.

        Whoever writes to a shared block first copies it. KvikError where the blocks are not there any more.
        """
        self._check_there(num_tokens, "fork")
        other = SequenceCache.__new__(SequenceCache)
        other.pool, other.layout = self.pool, self.layout
        other._groups = [group.shared(num_tokens) for group in self._groups]
        other._begin()
        other.num_tokens, other.evicted_at = num_tokens, self.evicted_at
        other._registered = min(self._registered, num_tokens // BLOCK_TOKENS)
        self._share()
        return other

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` slots; blocks that hold none of them are given back. KvikError as of `fork`."""
        if num_tokens == 0:
            self.free()
            return
        self._check_there(num_tokens, "truncate")
        for group in self._groups:
            group.drop_after(num_tokens)
        self.num_tokens = num_tokens
        self._registered = min(self._registered, num_tokens // BLOCK_TOKENS)
        self._touch()
        self._share()

    def _check_there(self, num_tokens: int, verb: str) -> None:
        """KvikError where the row at slot num_tokens would see, or pack, what was given up."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise KvikError(f"cannot {verb} {self.num_tokens} tokens to {num_tokens}")
        if num_tokens < self.evicted_at:
            raise KvikError(f"cannot {verb} to {num_tokens} tokens: some of the first {self.evicted_at} were evicted")
        for group in self._groups:
            if num_tokens and group.lacks(num_tokens):
                why = (
                    "a window's blocks from there were freed" if group.rule.window else "blocks from there were packed"
                )
                raise KvikError(f"cannot {verb} to {num_tokens} tokens: {why}")

    def free(self) -> None:
        """Give every block back."""
        for group in self._groups:
            group.drop_all()
        self._begin()

    # ---- parking

    def leave(self) -> SequenceCache:
        """A cache with these tables, whose blocks are given back all the same: for `parking`, which renumbers them."""
        gone = SequenceCache(self.pool, self.layout)
        gone._groups, self._groups = self._groups, gone._groups
        gone.num_tokens, gone.evicted_at, gone._registered = self.num_tokens, self.evicted_at, self._registered
        self.pool.release_many([block for group in gone._groups for table in group.tables for block in table.held()])
        gone._arrange()
        self._begin()
        return gone

    def renumber(self, old: NDArray[np.int32], new: NDArray[np.int32]) -> None:
        """Its blocks lie elsewhere now: of `old`, ascending, each at its place in `new`."""
        for table in self.tables:
            table.renumber(old, new)
        self._touch()

    # ---- evict

    def evict(self, counts: NDArray[np.int32]) -> SequenceCache:
        """A cache with blocks of its own for so many of the slots: `Executor.evict` copies them, then this one is freed.

        counts: [L, H_kv] slots kept, at least 1, alike in each group of `layout.after_event`; -1 in layers with a window of
        their own, whose blocks it shares. KvikError where the pool has not the blocks; nothing is changed then.
        """
        target = SequenceCache(self.pool, self.layout.after_event)
        kept = self._kept(target.layout, counts)
        needs = _needs(target.layout, kept)
        if not self.pool.can_take(needs):
            raise KvikError("the KV cache has not the blocks that an eviction takes")
        taken = {steps: iter(self.pool.take_many(steps, count)) for steps, count in needs.items()}
        for number, (group, count) in enumerate(zip(target._groups, kept, strict=True)):
            if count is None:
                target._groups[number] = shared = self._of_unit(group.rule.units[0]).shared(self.num_tokens)
                shared.rule = group.rule
                continue
            group.shift = self.num_tokens - count
            group.full.fill(group.rule.full(count), taken[group.full.steps])
            if group.pages is not None:
                places = group.rule.pages(count)
                group.pages.fill(places, taken.get(group.pages.steps, iter(())))
        target.num_tokens = target.evicted_at = self.num_tokens
        target._arrange()
        return target

    def can_evict(self, counts: NDArray[np.int32] | int) -> bool:
        """Whether `evict` would have the blocks. counts: as there, or the most slots that any layer and head keeps."""
        after = self.layout.after_event
        if isinstance(counts, int):
            kept = [
                None if rule.own else min(counts, self.num_tokens - self._of_unit(rule.units[0]).shift)
                for rule in after.groups
            ]
        else:
            kept = self._kept(after, counts)
        return self.pool.can_take(_needs(after, kept))

    def _of_unit(self, unit: tuple[int, int]) -> GroupTables:
        """The group that a (layer, head) lies in."""
        return self._groups[self.layout.executor.group_of[unit[0]][unit[1]]]

    def _kept(self, after: KVLayout, counts: NDArray[np.int32]) -> list[int | None]:
        """Slots kept in each group; None in those that are left alone."""
        found: list[int | None] = []
        for rule in after.groups:
            kept = {int(counts[unit]) for unit in rule.units}
            first, most = rule.units[0], self.num_tokens - self._of_unit(rule.units[0]).shift
            if len(kept) > 1:
                raise KvikError(f"layer {first[0]}, head {first[1]} cannot keep another number of slots than its group")
            count = kept.pop()
            if rule.own != (count == -1) or not (rule.own or 1 <= count <= most):
                raise KvikError(f"layer {first[0]}, head {first[1]} cannot keep {count} of {most} slots")
            found.append(None if rule.own else count)
        return found

    # ---- the prefix index

    def claim_prefix(self, keys: Sequence[BlockKey]) -> int:
        """Take over blocks of the index for the longest beginning of `keys` that is all there; tokens gained.

        All there means: what the next row sees, in full or packed, and what it or a later one packs.
        """
        index = self.pool.index
        assert self.num_tokens == 0
        if index is None or self.layout.by != "window":
            return 0
        count, last = len(keys), -1
        while count and count != last:
            last, count = count, self._most_found(index, keys, count)
        tokens = count * BLOCK_TOKENS
        for table, places, each in self._places(tokens):
            own = self.tables[table]
            claimed = [self.pool.claim(table, keys[_key(place, each)]) for place in _taken(places)]
            assert None not in claimed
            own.fill(places, iter(claimed))  # type: ignore[arg-type]  # see above
        self.num_tokens, self._registered = tokens, count
        self._touch()
        self._share()
        return tokens

    def _places(self, tokens: int) -> Iterator[tuple[int, Places, int]]:
        """Each table's number, the places that are there after so many tokens, and the tokens of a block."""
        for number, table in enumerate(self.layout.tables):
            rule = self._groups[table.group].rule
            yield number, rule.pages(tokens) if table.packed else rule.full(tokens), table.tokens

    def _most_found(self, index: PrefixIndex, keys: Sequence[BlockKey], count: int) -> int:
        """`count` where all of so many blocks is there; else the next smaller count that does not need what is missing."""
        for table, places, each in self._places(count * BLOCK_TOKENS):
            for place in _taken(places):
                if index.find(table, keys[_key(place, each)]) is None:
                    packed = self.layout.tables[table].packed
                    return ((place + 1) * each + RECENT - 1) // BLOCK_TOKENS if packed else place
        return count

    @property
    def unregistered(self) -> int:
        """Full blocks there are, where some were not shown to the index yet; else 0. Nothing is shown after an event."""
        if self.evicted_at or self.layout.by != "window" or self.num_full <= self._registered:
            return 0
        return self.num_full

    def register(self, keys: Sequence[BlockKey]) -> None:
        """Let the index find the full blocks, whose keys these are, and the pages packed of them."""
        index = self.pool.index
        assert index is not None
        before = self._places(self._registered * BLOCK_TOKENS)
        for (table, places, each), (_, old, _) in zip(self._places(len(keys) * BLOCK_TOKENS), before, strict=True):
            blocks = self.tables[table].blocks
            for place in range(old.count, places.count):
                if blocks[place] != FREED:
                    index.add(table, int(blocks[place]), keys[_key(place, each)])
        self._registered = len(keys)


def held_together(caches: Sequence[SequenceCache]) -> int:
    """Bytes of the blocks that the caches, of one pool, hold; shared ones counted once."""
    if len(caches) == 1:
        return caches[0].held_bytes
    return caches[0].bytes_of({block for cache in caches for block in cache.held()}) if caches else 0


def _needs(layout: KVLayout, kept: Sequence[int | None]) -> Counter[int]:
    """Blocks, by size, for so many slots in each group."""
    counts = []
    for table in layout.tables:
        count, rule = kept[table.group], layout.groups[table.group]
        counts.append(0 if count is None else (rule.pages(count) if table.packed else rule.full(count)).held)
    return layout.by_size(counts)


def _taken(places: Places) -> Iterator[int]:
    """The places that have blocks."""
    return chain(range(min(places.head, places.first)), range(places.first, places.count))


def _key(place: int, tokens: int) -> int:
    """Which key finds the block at this place: that of the last 16 tokens it holds."""
    return (place + 1) * tokens // BLOCK_TOKENS - 1

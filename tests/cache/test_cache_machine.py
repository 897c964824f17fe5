"""Any order of the cache's verbs against memory whose contents are known: nobody ever reads what is not theirs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvik.cache.blocks import BlockPool, slabs_for
from kvik.cache.layout import KVLayout, kv_layout
from kvik.cache.parking import Parked, park
from kvik.cache.prefix import BlockKey, PrefixIndex, block_keys
from kvik.cache.sequence_cache import BlockCopy, SequenceCache, held_together
from kvik.cache.storage import choose_slab_bytes
from kvik.errors import KvikError
from kvik.params.cache import CacheParams
from kvik.params.eviction import StreamingLLM, TOVA
from cache.memory import Memory, Numbers, shape, tables_of, visible

WINDOWS = (None, 20, None, 40)


def layout_of(windows: tuple[int | None, ...] = (None,) * 2, **params: Any) -> KVLayout:
    return kv_layout(shape(windows), CacheParams(**params))


def streaming(sinks: int, window: int) -> StreamingLLM:
    return StreamingLLM(sinks=sinks, window=window)


LAYOUTS = {
    "f16": layout_of(),
    "f16, windows": layout_of((None, 20, None, 20, None)),
    "f32, only windows": layout_of((18, 40, 40), k="f32", v="f32"),
    "int4, uniform events": layout_of(k="int4", v="int4", group_size=16, policy=TOVA()),
    "k8v4, groups of 32, none kept": layout_of(k="int8", v="int4", group_size=32, keep_first=0),
    "f16 keys, int4 values, 40 kept": layout_of(v="int4", group_size=32, keep_first=40),
    "int8, windows": layout_of((None, 20, 70), k="int8", v="int8", group_size=16, keep_first=5),
    "int8, groups larger than the window": layout_of((None, 40), k="int8", v="int8"),
    "streaming": layout_of(policy=streaming(20, 40)),
    "int4, streaming, windows": layout_of(
        (None, 33, 18), k="int4", v="int4", group_size=32, policy=streaming(4, 90)
    ),
    "int8, streaming within what is full": layout_of(k="int8", v="int8", group_size=16, policy=streaming(20, 24)),
    "f16, events by layer": layout_of(WINDOWS, policy=TOVA(), layers="pyramid"),
    "int8, events by head": layout_of(WINDOWS[:3], k="int8", v="int8", group_size=16, policy=TOVA(), layers="pyramid"),
}  # fmt: skip
LAYOUTS["int8, events by head"] = replace(LAYOUTS["int8, events by head"], heads="ada")
TEXTS = [[n, *range(1, 300)] for n in range(3)]
SEQUENCES = st.integers(0, 4)


@dataclass
class Held:
    """slots: of each group's table, which of the sequence's slots lie there."""

    cache: SequenceCache
    root: BlockKey
    tokens: list[int] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    events: int = 0

    def __post_init__(self) -> None:
        self.slots = self.slots or [[] for _ in self.cache.layout.groups]


class CacheMachine(RuleBasedStateMachine):
    """Five sequences over a small pool."""

    layout = LAYOUTS["f16"]

    @initialize(slabs=st.integers(1, 8))
    def begin(self, slabs: int) -> None:
        self.index = PrefixIndex()
        both = (self.layout, self.layout.after_event)
        slab_bytes = choose_slab_bytes(both, 0)
        slabs += slabs_for(self.layout.by_size(self.layout.sequence_blocks(120, 120)), slab_bytes)
        self.pool = BlockPool(slabs, slab_bytes, self.index)
        self.memory = Memory(slabs * slab_bytes)
        self.held = [self.fresh("") for _ in range(5)]
        self.parked: tuple[list[int], list[Held], Parked] | None = None

    def fresh(self, salt: str) -> Held:
        return Held(SequenceCache(self.pool, self.layout), self.index.root(salt, self.layout.name))

    def numbers(self, of: Held) -> Numbers:
        """What a model would store at each slot: it depends on all tokens before."""
        found, before = [], hash(of.root.hash)
        for token in of.tokens:
            before = hash((before, token))
            found.append(before)
        return np.array(found, np.int64)

    @rule(which=SEQUENCES, text=st.sampled_from(TEXTS), count=st.integers(1, 70), rejected=st.sampled_from([0, 0, 0, 5]))
    def append(self, which: int, text: list[int], count: int, rejected: int) -> None:
        """A pass, the last of whose tokens may have been a draft that is rejected, then what follows every pass."""
        of = self.held[which]
        cache, copies = of.cache, list[BlockCopy]()
        if not cache.can_append(count):
            with pytest.raises(KvikError, match="slabs"):  # and so somebody has to be preempted
                cache.append(count, copies)
            cache.free()
            self.held[which] = self.fresh("")
            return
        start = len(of.tokens)
        of.tokens += [text[i % len(text)] for i in range(start, start + count)]
        for slots in of.slots:
            slots += range(start, start + count)
        cache.append(count, copies)
        self.memory.copy(copies)
        numbers = self.numbers(of)
        for group, seen in enumerate(self.memory.run(tables_of(cache), start, numbers[start:])):
            assert (seen == numbers[self.visible(of, group, len(of.tokens) - 1)]).all()
        if 0 < rejected < count:
            cache.truncate(start + count - rejected)
            self.cut(of, start + count - rejected)
        self.register(which)
        cache.free_unseen()

    def visible(self, of: Held, group: int, row: int, coming: bool = False) -> list[int]:
        """Slots of the sequence that a row reads of a group's table; see `Memory.seen`."""
        rule, layout = of.cache.layout.groups[group], of.cache.layout.executor
        slots = of.slots[group]
        local = row - (len(of.tokens) - len(slots))
        found = visible(rule.window, 0 if rule.own else layout.sinks, local)
        if coming:
            found = found[:-1]
            if rule.packs:
                found = np.union1d(found, np.arange(layout.packed_end(local - 1), local))
        return [slots[at] for at in found]

    def cut(self, of: Held, count: int) -> None:
        gone = len(of.tokens) - count
        del of.tokens[count:], of.keys[count // 16 :]
        for slots in of.slots:
            del slots[max(0, len(slots) - gone) :]

    @rule(which=SEQUENCES)
    def register(self, which: int) -> None:
        of = self.held[which]
        if of.cache.unregistered:
            assert not of.events
            block_keys(self.index, of.root, of.tokens, of.keys, of.cache.num_full)
            of.cache.register(of.keys[: of.cache.num_full])

    @rule(which=SEQUENCES, other=SEQUENCES, back=st.sampled_from([0, 0, 1, 30, 200]))
    def fork(self, which: int, other: int, back: int) -> None:
        of = self.held[which]
        count = max(0, len(of.tokens) - back)
        if which == other or count == 0:
            return
        try:
            forked = of.cache.fork(count)
        except KvikError:
            assert (of.cache.forgets or of.events) and count < len(of.tokens)
            return
        self.held[other].cache.free()
        self.held[other] = Held(forked, of.root, list(of.tokens), list(of.keys), [list(s) for s in of.slots], of.events)
        self.cut(self.held[other], count)

    @rule(which=SEQUENCES, back=st.sampled_from([0, 1, 3, 30, 200]))
    def truncate(self, which: int, back: int) -> None:
        of = self.held[which]
        count = max(0, len(of.tokens) - back)
        try:
            of.cache.truncate(count)
        except KvikError:
            assert (of.cache.forgets or of.events) and 0 < count < len(of.tokens)
            return
        if count:
            self.cut(of, count)
        else:
            self.held[which] = Held(of.cache, of.root, events=of.cache.layout.by != "window")

    @rule(which=SEQUENCES)
    def free(self, which: int) -> None:
        self.held[which].cache.free()
        self.held[which] = self.fresh("")

    @rule(which=SEQUENCES, text=st.sampled_from(TEXTS), blocks=st.integers(1, 10), salt=st.sampled_from(["", "x"]))
    def claim_prefix(self, which: int, text: list[int], blocks: int, salt: str) -> None:
        self.held[which].cache.free()
        of = self.held[which] = self.fresh(salt)
        block_keys(self.index, of.root, text, of.keys, blocks)
        of.tokens = text[: of.cache.claim_prefix(of.keys)]
        of.slots = [list(range(len(of.tokens))) for _ in of.slots]
        del of.keys[len(of.tokens) // 16 :]

    @rule(which=SEQUENCES, data=st.data())
    def evict(self, which: int, data: st.DataObject) -> None:
        """An event; the numbers kept of each group are drawn, as few as one and as many as all."""
        of = self.held[which]
        before, after = of.cache, of.cache.layout.after_event
        if not of.tokens or self.layout.executor.sinks:
            return
        counts = np.full((len(self.layout.executor.group_of), 2), -1, np.int32)
        kept: dict[int, Numbers] = {}
        slots = []
        for number, group in enumerate(after.groups):
            layer, head = group.units[0]
            own = of.slots[before.layout.executor.group_of[layer][head]]
            if not group.own:
                share = data.draw(st.sampled_from([0.01, 0.3, 0.7, 1.0]))
                count = max(1, int(share * len(own)))
                kept[number] = np.sort(np.random.default_rng(count).permutation(len(own))[:count])
                for unit in group.units:
                    counts[unit] = count
                own = [own[i] for i in kept[number]]
            slots.append(list(own))
        if not before.can_evict(counts):
            with pytest.raises(KvikError, match="has not the blocks"):
                before.evict(counts)
            return
        target = before.evict(counts)
        self.memory.evict(tables_of(before), tables_of(target), kept)
        before.free()
        of.cache, of.slots, of.events = target, slots, of.events + 1

    @rule(some=st.sets(SEQUENCES, min_size=1, max_size=3))
    def park(self, some: set[int]) -> None:
        if self.parked is not None:
            return
        which = sorted(some)
        held = [self.held[i] for i in which]
        before, total = held_together([of.cache for of in held]), self.pool.held_bytes
        others = {b for i, of in enumerate(self.held) if i not in some for b in of.cache.held()}
        shared = len(others & {b for of in held for b in of.cache.held()})
        parked = park([of.cache for of in held], self.memory)  # type: ignore[arg-type] # save and restore are all it needs
        assert parked.nbytes == before and all(of.cache.num_held == 0 for of in held)
        assert shared or self.pool.held_bytes == total - before
        self.parked = (which, held, parked)
        for i in which:
            self.held[i] = self.fresh("")

    @rule()
    def restore(self) -> None:
        if self.parked is None:
            return
        which, held, parked = self.parked
        if not self.pool.can_take(parked.needs):
            with pytest.raises(KvikError, match="has not the blocks"):
                parked.restore(self.memory, self.pool)  # type: ignore[arg-type]
            return
        caches = parked.restore(self.memory, self.pool)  # type: ignore[arg-type]
        self.parked = None
        for i, of, cache in zip(which, held, caches, strict=True):
            self.held[i].cache.free()
            of.cache = cache
            self.held[i] = of

    @rule(needs=st.lists(st.integers(0, 9), min_size=2, max_size=2))
    def can_take(self, needs: list[int]) -> None:
        """True means that all takes succeed, False that they cannot."""
        wanted = {table.steps: count for table, count in zip(self.layout.after_event.tables, needs, strict=False)}
        taken: list[int] = []
        possible = self.pool.can_take(wanted)
        try:
            for steps, count in wanted.items():
                if count:
                    taken.append(self.pool.take(steps))
                    taken += self.pool.take_many(steps, count - 1)
            assert possible
        except KvikError:
            assert not possible
        self.pool.release_many(taken)

    @invariant()
    def everybody_reads_their_own(self) -> None:
        self.pool.check_integrity([of.cache.held() for of in self.held])
        for of in self.held:
            count = len(of.tokens)
            assert of.cache.num_tokens == count
            numbers, tables = self.numbers(of), tables_of(of.cache)
            for group, slots in enumerate(of.slots):
                assert tables.of_group(group)[2] == count - len(slots)
                want = numbers[self.visible(of, group, count, coming=True)]
                assert (self.memory.seen(tables, group, count, coming=True) == want).all()

    @invariant()
    def bytes_are_those_of_the_tables(self) -> None:
        held = [block for of in self.held for block in of.cache.held()]
        assert self.pool.num_held == len(set(held)) == sum(self.pool.held_blocks().values())
        assert self.pool.held_bytes == self.pool.bytes_of(set(held)) == held_together([of.cache for of in self.held])
        assert sum(of.cache.held_bytes for of in self.held) == self.pool.bytes_of(held)
        for of in self.held:
            arrays = of.cache.arrays
            assert sum(block != -1 for block in arrays.blocks.tolist()) == of.cache.num_held
            assert arrays.lengths == tuple(table.count for table in of.cache.tables)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("examples", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_any_order_of_verbs(name: str, examples: int) -> None:
    machine = type("Machine", (CacheMachine,), {"layout": LAYOUTS[name]})
    case = machine.TestCase()
    case.settings = settings(max_examples=examples, stateful_step_count=30, deadline=None, print_blob=False)
    case.runTest()

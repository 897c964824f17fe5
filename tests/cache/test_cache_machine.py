"""Any order of the cache's verbs against memory whose contents are known: nobody ever reads what is not theirs."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvik.cache.blocks import BlockPool
from kvik.cache.layout import KVLayout, LayerGroup
from kvik.cache.prefix import BlockKey, PrefixIndex, block_keys
from kvik.cache.sequence_cache import BlockCopy, SequenceCache
from kvik.errors import KvikError

LAYOUTS = {
    "plain": KVLayout("f16", 1, 16, (LayerGroup((0, 1), 0),)),
    "3 full, 2 windows": KVLayout("f16", 1, 16, (LayerGroup((0, 1, 2), 0), LayerGroup((3, 4), 20))),
    "two windows": KVLayout("f16", 1, 16, (LayerGroup((0,), 18), LayerGroup((1, 2), 40))),
}
TEXTS = [[n, *range(1, 90)] for n in range(3)]
SEQUENCES = st.integers(0, 4)


@dataclass
class Held:
    cache: SequenceCache
    root: BlockKey
    tokens: list[int] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)


class CacheMachine(RuleBasedStateMachine):
    """Five sequences over a small pool. Memory is numbered by layer of a block, so that groups share it as they really do."""

    layout = LAYOUTS["plain"]

    @initialize(slabs=st.integers(3, 12))
    def begin(self, slabs: int) -> None:
        self.index = PrefixIndex()
        self.pool = BlockPool(slabs, self.layout.slab_blocks, self.index)
        self.memory: dict[tuple[int, int], int] = {}
        self.held = [self.fresh("") for _ in range(5)]
        self.salts = {self.index.root(salt).hash: salt for salt in ("", "x")}

    def fresh(self, salt: str) -> Held:
        return Held(SequenceCache(self.pool, self.layout), self.index.root(salt))

    def places(self, group: int, block: int, offset: int) -> list[tuple[int, int]]:
        layers = len(self.layout.groups[group].layers)
        return [(block * layers + i, offset) for i in range(layers)]

    def value(self, of: Held, slot: int) -> int:
        """What a model would store at the slot: it depends on all tokens before."""
        return hash((of.root.hash, tuple(of.tokens[: slot + 1])))

    @rule(which=SEQUENCES, text=st.sampled_from(TEXTS), count=st.integers(1, 40))
    def append(self, which: int, text: list[int], count: int) -> None:
        of = self.held[which]
        copies: list[BlockCopy] = []
        if not of.cache.can_append(count):
            with pytest.raises(KvikError, match="slabs"):  # and so somebody has to be preempted
                of.cache.append(count, copies)
            of.cache.free()
            self.held[which] = Held(of.cache, of.root)
            return
        start = len(of.tokens)
        of.tokens += [text[i % len(text)] for i in range(start, start + count)]
        of.cache.append(count, copies)
        for group, source, target in copies:
            for offset in range(16):
                for old, new in zip(
                    self.places(group, source, offset), self.places(group, target, offset), strict=True
                ):
                    self.memory[new] = self.memory.get(old, 0)
        for slot in range(start, start + count):
            for group, table in enumerate(of.cache.tables):
                for place in self.places(group, int(table.blocks[slot // 16]), slot % 16):
                    self.memory[place] = self.value(of, slot)

    @rule(which=SEQUENCES)
    def register(self, which: int) -> None:
        of = self.held[which]
        if of.cache.unregistered:
            block_keys(self.index, of.root, of.tokens, of.keys, of.cache.num_full)
            of.cache.register(of.keys[: of.cache.num_full])

    @rule(which=SEQUENCES, other=SEQUENCES, share=st.floats(0, 1))
    def fork(self, which: int, other: int, share: float) -> None:
        of = self.held[which]
        count = int(share * len(of.tokens))
        if which == other:
            return
        try:
            forked = of.cache.fork(count)
        except KvikError:
            assert of.cache.forgets and count < len(of.tokens)
            return
        self.held[other].cache.free()
        self.held[other] = Held(forked, of.root, of.tokens[:count], of.keys[: count // 16])

    @rule(which=SEQUENCES, share=st.floats(0, 1))
    def truncate(self, which: int, share: float) -> None:
        of = self.held[which]
        count = int(share * len(of.tokens))
        try:
            of.cache.truncate(count)
        except KvikError:
            assert of.cache.forgets and count < len(of.tokens)
            return
        del of.tokens[count:], of.keys[count // 16 :]

    @rule(which=SEQUENCES)
    def free(self, which: int) -> None:
        self.held[which].cache.free()
        self.held[which] = self.fresh("")

    @rule(which=SEQUENCES)
    def evict_unseen(self, which: int) -> None:
        self.held[which].cache.evict_unseen()

    @rule(which=SEQUENCES, text=st.sampled_from(TEXTS), blocks=st.integers(1, 5), salt=st.sampled_from(["", "x"]))
    def claim_prefix(self, which: int, text: list[int], blocks: int, salt: str) -> None:
        self.held[which].cache.free()
        of = self.held[which] = self.fresh(salt)
        block_keys(self.index, of.root, text, of.keys, blocks)
        of.tokens = text[: of.cache.claim_prefix(of.keys)]
        del of.keys[len(of.tokens) // 16 :]

    @rule(needs=st.lists(st.integers(0, 9), min_size=2, max_size=2))
    def can_take(self, needs: list[int]) -> None:
        """True means that all takes succeed, False that they cannot."""
        needs = needs[: len(self.layout.groups)]
        taken: list[tuple[int, int]] = []
        possible = self.pool.can_take(needs)
        try:
            for group in (g for g, count in enumerate(needs) for _ in range(count)):
                taken.append((group, self.pool.take(group)))
            assert possible
        except KvikError:
            assert not possible
        for group, block in taken:
            self.pool.release(group, block)

    @invariant()
    def everybody_reads_their_own(self) -> None:
        self.pool.check_integrity([of.cache.held() for of in self.held])
        for of in self.held:
            assert of.cache.num_tokens == len(of.tokens)
            for group, (shape, table) in enumerate(zip(self.layout.groups, of.cache.tables, strict=True)):
                first = max(0, len(of.tokens) + 1 - shape.window) if shape.window else 0
                for slot in range(first, len(of.tokens)):
                    for place in self.places(group, int(table.blocks[slot // 16]), slot % 16):
                        assert self.memory[place] == self.value(of, slot)

    @invariant()
    def bytes_are_those_of_the_tables(self) -> None:
        held = [pair for of in self.held for pair in of.cache.held()]
        assert self.pool.num_held == len(set(held)) == sum(self.pool.held_blocks())
        assert sum(of.cache.held_bytes for of in self.held) == sum(self.layout.block_bytes[g] for g, _ in held)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_order_of_verbs(name: str, examples: int) -> None:
    machine = type("Machine", (CacheMachine,), {"layout": LAYOUTS[name]})
    case = machine.TestCase()
    case.settings = settings(max_examples=examples, stateful_step_count=40, deadline=None, print_blob=False)
    case.runTest()

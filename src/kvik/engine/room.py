"""How many slabs a request takes at most, whatever its policy and format: what admission compares with the pool."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from kvik.cache.blocks import slabs_for
from kvik.cache.layout import BLOCK_TOKENS, KVLayout
from kvik.params import CacheParams

__all__ = ["Room"]

Blocks = Counter[int]


class Room(NamedTuple):
    """Of n samples or beams of a prompt.

    layout, cache: of the request; prompt: its tokens as the policy sees them. chunk: most tokens a step. slab_bytes: of the
    pool.
    """

    layout: KVLayout
    cache: CacheParams
    prompt: int | None
    chunk: int
    slab_bytes: int

    def slabs(self, shared: int, tokens: int, n: int) -> int:
        """Most slabs held at once while each sample comes to `tokens` tokens, `shared` of them in common.

        Blocks of a size fill a slab before they take another. Those of a size that is not there later are back by then.
        """
        stages = self._stages(shared, tokens, n)
        most, before = 0, Counter[int]()
        for stage in stages:
            blocks = Counter({size: max(count, before[size]) for size, count in stage.items()})
            most, before = max(most, slabs_for(blocks, self.slab_bytes)), blocks
        return most

    def copying(self, tokens: int) -> Blocks:
        """Blocks by size that an event takes for what is kept of a sequence of so many tokens."""
        assert self.cache.scorer is not None
        return self._evicted(self.cache.scorer.kept(tokens), 1)

    def _stages(self, shared: int, tokens: int, n: int) -> list[Blocks]:
        """Most blocks by size: before anything is evicted, while the first event copies what is kept, and after it."""
        scorer = self.cache.scorer
        first = None if scorer is None else scorer.event(self.prompt, 0)
        if scorer is None or first is None or first >= tokens:
            return [self._shared(shared, tokens, n)]
        begun = self._shared(min(shared, first), first, n)
        kept = min(tokens, scorer.kept(tokens))
        held = min(tokens, kept + 1 + scorer.every if scorer.every else scorer.kept(first) + tokens - first)
        after = self._evicted(held, n, tokens) + self._evicted(kept, 1)
        return [begun, begun + self._evicted(scorer.kept(first), n), after]

    def _shared(self, shared: int, tokens: int, n: int) -> Blocks:
        """Of n samples that have `shared` tokens in common."""
        whole, common = self.layout.sequence_blocks(tokens, self.chunk), []
        for table in self.layout.tables:
            group = self.layout.groups[table.group]
            if group.window or (group.forgets and not table.packed):
                common.append(0)
            else:
                common.append(group.pages(shared).held if table.packed else shared // BLOCK_TOKENS)
        return self.layout.by_size(own * n - same * (n - 1) for own, same in zip(whole, common, strict=True))

    def _evicted(self, kept: int, n: int, tokens: int | None = None) -> Blocks:
        """Of n samples that hold so many tokens on average in each layer and head, however they are spread.

        tokens: of the sequence; layers with a window of their own, which evict nothing, go by them. None: without these layers.
        """
        layout, whole = self.layout.after_event, []
        slack = 0 if layout is self.layout else 1  # a table of fewer tokens may fill its last block less
        for table in layout.tables:
            group = layout.groups[table.group]
            if group.own:
                count = 0 if tokens is None else group.most(tokens, self.chunk)[table.packed]
            else:
                count = group.most(kept, self.chunk)[table.packed] + slack
            whole.append(count * n)
        return layout.by_size(whole)

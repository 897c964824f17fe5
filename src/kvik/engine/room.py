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

    layout, cache: of the request. chunk: most tokens a step. slab_bytes: of the pool.
    """

    layout: KVLayout
    cache: CacheParams
    chunk: int
    slab_bytes: int

    def slabs(self, prompt: int, tokens: int, n: int) -> int:
        """Most slabs held at once while each sample comes to `tokens` tokens, the prompt's included.

        Blocks of a size fill a slab before they take another. Those of a size that is not there later are back by then.
        """
        stages = self._stages(prompt, tokens, n)
        most, before = 0, Counter[int]()
        for stage in stages:
            blocks = Counter({size: max(count, before[size]) for size, count in stage.items()})
            most, before = max(most, slabs_for(blocks, self.slab_bytes)), blocks
        return most

    def copying(self, tokens: int) -> Blocks:
        """Blocks by size that an event takes for what is kept of a sequence of so many tokens."""
        assert self.cache.scorer is not None
        return self._evicted(self.cache.scorer.kept(tokens, tokens), 1)

    def _stages(self, prompt: int, tokens: int, n: int) -> list[Blocks]:
        """Most blocks by size: before anything is evicted, while the first event copies what is kept, and after it."""
        scorer = self.cache.scorer
        first = tokens if scorer is None else scorer.at or prompt
        begun = self._shared(min(prompt, first), min(tokens, first), n)
        if scorer is None or tokens <= first:
            return [begun]
        last = first if not scorer.every else first + (tokens - 1 - first) // scorer.every * scorer.every
        kept = scorer.kept(last, last)
        fresh = self._evicted(kept, n)
        grown = self._evicted(min(tokens, kept + (scorer.every or tokens - first)), n) + self._evicted(kept, 1)
        return [begun, begun + fresh, grown]

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

    def _evicted(self, kept: int, n: int) -> Blocks:
        """Of n samples that hold so many tokens on average in each layer and head, however they are spread."""
        layout = self.layout.after_event
        slack = 0 if layout is self.layout else 1  # a table of fewer tokens may fill its last block less
        whole = layout.sequence_blocks(kept, self.chunk)
        return layout.by_size((count + slack) * n for count in whole)

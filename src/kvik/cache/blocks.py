"""Which blocks of the cache are free and who holds which. No bytes here: storage belongs to the executor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvik.cache.prefix import BlockKey, PrefixIndex
from kvik.errors import KvikError

__all__ = ["BlockPool"]

_NOBODY = -1


class BlockPool:
    """Slabs of equal bytes, each carved into blocks of one group at a time, with a reference count for every block.

    A block is *held* by block tables, or *kept* only to be found by the prefix index, or free. A slab none of whose blocks
    is held can serve any group. A group takes another slab only where those that it holds are full, so that what fits the
    pool by count does so whatever is kept.

    Args:
        num_slabs: of the pool.
        slab_blocks: blocks that a slab has, by group (`KVLayout.slab_blocks`).
        index: of full blocks; None keeps nothing.
    """

    def __init__(self, num_slabs: int, slab_blocks: Sequence[int] = (1,), index: PrefixIndex | None = None) -> None:
        self.num_slabs, self.slab_blocks, self.index = num_slabs, tuple(slab_blocks), index
        self._free_slabs = list(range(num_slabs - 1, -1, -1))
        self._owner = [_NOBODY] * num_slabs
        self._held_in = [0] * num_slabs  # blocks of the slab that are held
        self._spare: list[list[int]] = [[] for _ in range(num_slabs)]  # free blocks of an owned slab
        self._holders: list[dict[int, int]] = [{} for _ in slab_blocks]  # by group, block: tables that hold it
        # by group, slabs: held in part and with free blocks; held in part and kept in part; idle with free blocks
        self._open: list[dict[int, None]] = [{} for _ in slab_blocks]
        self._mixed: list[dict[int, None]] = [{} for _ in slab_blocks]
        self._roomy: list[dict[int, None]] = [{} for _ in slab_blocks]
        self._loose = [0] * len(self.slab_blocks)  # by group: blocks not held, in slabs with blocks that are
        self._idle = 0  # owned slabs none of whose blocks is held

    @property
    def num_held(self) -> int:
        """Blocks that tables hold, each counted once."""
        return sum(map(len, self._holders))

    @property
    def num_free_slabs(self) -> int:
        """Slabs that can be had at once, those that are only kept to be found among them."""
        return len(self._free_slabs) + self._idle

    def held_blocks(self) -> tuple[int, ...]:
        """Blocks that tables hold, by group, each counted once."""
        return tuple(map(len, self._holders))

    def can_take(self, blocks: Sequence[int]) -> bool:
        """Whether so many more blocks of each group can be had."""
        slabs = 0
        for group, count in enumerate(blocks):
            more = count - self._loose[group]
            if more > 0:
                slabs += -(-more // self.slab_blocks[group])
        return slabs <= len(self._free_slabs) + self._idle

    def take(self, group: int) -> int:
        """A block for one holder. KvikError when none can be had: the scheduler must not have admitted this."""
        if not self._open[group]:
            self._make_room(group)
        slab = next(reversed(self._open[group] or self._roomy[group]))
        block = self._spare[slab].pop()
        self._count_held(group, slab)
        self._holders[group][block] = 1
        return block

    def _make_room(self, group: int) -> None:
        """See to it that a slab of the group has a free block."""
        if self._mixed[group]:
            self._give_up(group, next(iter(self._mixed[group])), 1)
        elif self._free_slabs:
            slab = self._free_slabs.pop()
            self._owner[slab] = group
            self._idle += 1
            each = self.slab_blocks[group]
            self._spare[slab] = list(range((slab + 1) * each - 1, slab * each - 1, -1))
            self._file(group, slab)
        elif not self._roomy[group]:
            self._give_up_idle(group)

    def _give_up_idle(self, group: int) -> None:
        """Of the idle slab with the least recently used kept block, give up that one, or all where it is another group's."""
        for owner, block in self.index.unheld_blocks() if self.index is not None else ():
            slab = block // self.slab_blocks[owner]
            if self._held_in[slab] == 0:
                break
        else:
            raise KvikError(f"all {self.num_slabs} slabs of the KV cache are in use")
        if owner == group:
            assert self.index is not None
            self.index.forget(group, block)
            self._spare_block(group, slab, block)
        else:
            self._give_up(owner, slab, self.slab_blocks[owner])
        self._make_room(group)

    def _give_up(self, group: int, slab: int, most: int) -> None:
        """Up to `most` of the slab's kept blocks become free, the last ones first: a prefix needs its beginning."""
        assert self.index is not None
        each = self.slab_blocks[group]
        for block in range((slab + 1) * each - 1, slab * each - 1, -1):
            if most and block not in self._holders[group] and self.index.has(group, block):
                self.index.forget(group, block)
                self._spare_block(group, slab, block)
                most -= 1

    def share(self, group: int, block: int) -> None:
        """One more holder of a block that is held already."""
        self._holders[group][block] += 1

    def claim(self, group: int, key: BlockKey) -> int | None:
        """A holder for the block with this content, where there is one."""
        block = None if self.index is None else self.index.find(group, key)
        if block is None or self.index is None:
            return None
        holders = self._holders[group]
        if block in holders:
            holders[block] += 1
        else:
            self.index.held(group, block)
            self._count_held(group, block // self.slab_blocks[group])
            holders[block] = 1
        return block

    def is_shared(self, group: int, block: int) -> bool:
        """Whether a held block has several holders."""
        return self._holders[group][block] > 1

    def sole(self, group: int, block: int) -> bool:
        """Whether its one holder may write to the block; it can no longer be found by what it held."""
        if self._holders[group][block] > 1:
            return False
        if self.index is not None:
            self.index.forget(group, block)
        return True

    def release(self, group: int, block: int) -> None:
        """One holder gives the block up."""
        holders = self._holders[group]
        count = holders.get(block, 0)
        if count < 1:
            raise KvikError(f"block {block} of group {group} is released more often than it is held")
        if count > 1:
            holders[block] = count - 1
            return
        del holders[block]
        slab = block // self.slab_blocks[group]
        self._count_released(group, slab)
        if self.index is None or not self.index.unheld(group, block):
            self._spare_block(group, slab, block)
        else:
            self._file(group, slab)

    def _count_held(self, group: int, slab: int) -> None:
        """A block of the slab that was not held is held from now on."""
        if self._held_in[slab] == 0:
            self._idle -= 1
            self._loose[group] += self.slab_blocks[group]
        self._held_in[slab] += 1
        self._loose[group] -= 1
        self._file(group, slab)

    def _count_released(self, group: int, slab: int) -> None:
        self._held_in[slab] -= 1
        self._loose[group] += 1
        if self._held_in[slab] == 0:
            self._idle += 1
            self._loose[group] -= self.slab_blocks[group]

    def _spare_block(self, group: int, slab: int, block: int) -> None:
        """The block is neither held nor kept; a slab of which that is true altogether belongs to nobody."""
        self._spare[slab].append(block)
        if len(self._spare[slab]) == self.slab_blocks[group]:
            self._spare[slab] = []
            self._owner[slab] = _NOBODY
            self._idle -= 1
            self._free_slabs.append(slab)
        self._file(group, slab)

    def _file(self, group: int, slab: int) -> None:
        """Put the slab where `take` looks for it."""
        held, spare = self._held_in[slab], len(self._spare[slab])
        mixed = 0 < held < self.slab_blocks[group] - spare
        for slabs, wanted in (
            (self._open, held and spare), (self._mixed, mixed), (self._roomy, spare and not held),
        ):  # fmt: skip
            if wanted:
                slabs[group][slab] = None
            else:
                slabs[group].pop(slab, None)

    def check_integrity(self, tables: Iterable[Iterable[tuple[int, int]]]) -> None:
        """Raise KvikError unless held + kept + free = total and every count is that of the tables' (group, block) pairs."""
        held: list[dict[int, int]] = [{} for _ in self.slab_blocks]
        for table in tables:
            for group, block in table:
                held[group][block] = held[group].get(block, 0) + 1
        if held != self._holders:
            raise KvikError("block counts differ from the block tables")
        kept: list[set[int]] = [set() for _ in self.slab_blocks]
        for group, block in self.index.unheld_blocks() if self.index is not None else ():
            if block in held[group]:
                raise KvikError(f"block {block} of group {group} is held and kept to be found at once")
            kept[group].add(block)
        idle, loose = 0, [0] * len(self.slab_blocks)
        for slab, owner in enumerate(self._owner):
            if owner == _NOBODY:
                if self._spare[slab] or self._held_in[slab]:
                    raise KvikError(f"slab {slab} belongs to nobody and has blocks")
                continue
            each = self.slab_blocks[owner]
            blocks = range(slab * each, (slab + 1) * each)
            used = sum(block in held[owner] for block in blocks)
            spare = set(self._spare[slab])
            if used != self._held_in[slab] or spare != {
                b for b in blocks if b not in held[owner] and b not in kept[owner]
            }:
                raise KvikError(f"the books of slab {slab} are wrong")
            if len(spare) != len(self._spare[slab]) or len(spare) == each:
                raise KvikError(f"the free blocks of slab {slab} are wrong")
            filed = [slab in slabs[owner] for slabs in (self._open, self._mixed, self._roomy)]
            if filed != [bool(spare and used), bool(used and len(spare) + used < each), bool(spare and not used)]:
                raise KvikError(f"slab {slab} is in the wrong place")
            idle += used == 0
            loose[owner] += each - used if used else 0
        free = [slab for slab, owner in enumerate(self._owner) if owner == _NOBODY]
        if sorted(self._free_slabs) != free or idle != self._idle or loose != self._loose:
            raise KvikError("the counts of free slabs are wrong")

"""Which blocks of the cache are free and who holds which. No bytes here: storage belongs to the executor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvik.cache.prefix import BlockKey, PrefixIndex
from kvik.errors import KvikError
from kvik.ops.pages import ADDRESS_BYTES

__all__ = ["BlockPool", "slabs_for"]


def slabs_for(blocks: Mapping[int, int], slab_bytes: int) -> int:
    """Slabs that blocks take, given by their size in steps of 64 bytes; each size is no more than a slab."""
    steps = slab_bytes // ADDRESS_BYTES
    return sum(-(-count // (steps // size)) for size, count in blocks.items())


class _Size:
    """Blocks of one size, in steps of 64 bytes; each: that a slab has.

    Slabs by where `take` looks: open: held in part and with free blocks; mixed: held in part and kept in part; roomy: idle
    with free blocks. loose: blocks not held, in slabs with blocks that are. held: blocks. slabs: carved so.
    """

    __slots__ = ("each", "held", "loose", "mixed", "open", "roomy", "slabs", "steps")

    def __init__(self, steps: int, each: int) -> None:
        self.steps, self.each = steps, each
        self.open: dict[int, None] = {}
        self.mixed: dict[int, None] = {}
        self.roomy: dict[int, None] = {}
        self.loose = self.held = self.slabs = 0


class BlockPool:
    """Slabs of equal bytes, each carved into blocks of one size at a time, with a reference count for every block.

    A block is named by its *address*, its first byte / 64 from the beginning of the pool, unique over all sizes. It is *held* by
    block tables, or *kept* only to be found by the prefix index, or free. A slab none of whose blocks is held can serve any
    size. A size takes another slab only where those that it has are full, so that what fits the pool by count does so
    whatever is kept. What is left of a slab behind its last whole block is waste.

    Args:
        num_slabs: of the pool.
        slab_bytes: a multiple of 64.
        index: of full blocks; None keeps nothing.
    """

    def __init__(self, num_slabs: int, slab_bytes: int, index: PrefixIndex | None = None) -> None:
        if slab_bytes < ADDRESS_BYTES or slab_bytes % ADDRESS_BYTES:
            raise KvikError(f"slab_bytes must be a multiple of {ADDRESS_BYTES}, got {slab_bytes}")
        self.num_slabs, self.slab_bytes, self.index = num_slabs, slab_bytes, index
        self._steps = slab_bytes // ADDRESS_BYTES
        self._free_slabs = list(range(num_slabs - 1, -1, -1))
        self._owner: list[_Size | None] = [None] * num_slabs
        self._held_in = [0] * num_slabs  # blocks of the slab that are held
        self._spare: list[list[int]] = [[] for _ in range(num_slabs)]  # free blocks of an owned slab
        self._holders: dict[int, int] = {}  # by block: tables that hold it
        self._sizes: dict[int, _Size] = {}
        self._idle = 0  # owned slabs none of whose blocks is held

    # ---- what there is

    @property
    def num_held(self) -> int:
        """Blocks that tables hold, each counted once."""
        return len(self._holders)

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks that tables hold, each counted once."""
        return sum(size.held * size.steps for size in self._sizes.values()) * ADDRESS_BYTES

    @property
    def waste_bytes(self) -> int:
        """Bytes behind the last whole block of slabs that are in use."""
        return sum(size.slabs * (self._steps - size.each * size.steps) for size in self._sizes.values()) * ADDRESS_BYTES

    @property
    def num_free_slabs(self) -> int:
        """Slabs that can be had at once, those that are only kept to be found among them."""
        return len(self._free_slabs) + self._idle

    def held_blocks(self) -> dict[int, int]:
        """Blocks that tables hold, each counted once, by size in steps of 64 bytes."""
        return {steps: size.held for steps, size in self._sizes.items() if size.held}

    def steps_of(self, block: int) -> int:
        """Size, in steps of 64 bytes, of a block that is held or kept."""
        size = self._owner[block // self._steps]
        assert size is not None
        return size.steps

    def bytes_of(self, blocks: Iterable[int]) -> int:
        """Bytes of blocks that are held or kept."""
        return sum(map(self.steps_of, blocks)) * ADDRESS_BYTES

    def can_take(self, blocks: Mapping[int, int]) -> bool:
        """Whether so many more blocks can be had, by size in steps of 64 bytes."""
        slabs = 0
        for steps, count in blocks.items():
            size = self._sizes.get(steps)
            if size is None:
                if count and steps > self._steps:
                    return False
                slabs += -(-count // (self._steps // steps)) if count else 0
            elif count > size.loose:
                slabs += -(-(count - size.loose) // size.each)
        return slabs <= len(self._free_slabs) + self._idle

    # ---- taking

    def take(self, steps: int) -> int:
        """A block for one holder. KvikError when none can be had: the scheduler must not have admitted this."""
        size = self._sizes.get(steps) or self._new_size(steps)
        if not size.open:
            self._make_room(size)
        slab = next(reversed(size.open or size.roomy))
        block = self._spare[slab].pop()
        self._count_held(size, slab, 1)
        self._holders[block] = 1
        return block

    def take_many(self, steps: int, count: int) -> list[int]:
        """`take` so many times, or not at all."""
        size = self._sizes.get(steps) or self._new_size(steps)
        taken: list[int] = []
        try:
            while len(taken) < count:
                if not size.open:
                    self._make_room(size)
                slab = next(reversed(size.open or size.roomy))
                spare = self._spare[slab]
                some = spare[: -1 - (count - len(taken)) : -1]
                del spare[len(spare) - len(some) :]
                self._count_held(size, slab, len(some))
                self._holders.update(dict.fromkeys(some, 1))
                taken += some
        except KvikError:
            self.release_many(taken)
            raise
        return taken

    def _new_size(self, steps: int) -> _Size:
        if not 0 < steps <= self._steps:
            raise KvikError(f"a block of {steps * ADDRESS_BYTES} bytes does not fit a slab of {self.slab_bytes}")
        size = self._sizes[steps] = _Size(steps, self._steps // steps)
        return size

    def _blocks(self, size: _Size, slab: int) -> range:
        begin = slab * self._steps
        return range(begin, begin + size.each * size.steps, size.steps)

    def _make_room(self, size: _Size) -> None:
        """See to it that a slab of this size has a free block."""
        if size.mixed:
            self._give_up(size, next(iter(size.mixed)), 1)
        elif self._free_slabs:
            slab = self._free_slabs.pop()
            self._owner[slab] = size
            self._idle += 1
            size.slabs += 1
            self._spare[slab] = list(reversed(self._blocks(size, slab)))
            self._file(size, slab)
        elif not size.roomy:
            self._give_up_idle(size)

    def _give_up_idle(self, size: _Size) -> None:
        """Of the idle slab with the least recently used kept block, give up that one, or all where it has another size."""
        for block in self.index.unheld_blocks() if self.index is not None else ():
            slab = block // self._steps
            if self._held_in[slab] == 0:
                break
        else:
            raise KvikError(f"all {self.num_slabs} slabs of the KV cache are in use")
        owner = self._owner[slab]
        assert owner is not None and self.index is not None
        if owner is size:
            self.index.forget(block)
            self._spare_blocks(size, slab, [block])
        else:
            self._give_up(owner, slab, owner.each)
        self._make_room(size)

    def _give_up(self, size: _Size, slab: int, most: int) -> None:
        """Up to `most` of the slab's kept blocks become free, the last ones first: a prefix needs its beginning."""
        assert self.index is not None
        for block in reversed(self._blocks(size, slab)):
            if most and block not in self._holders and self.index.has(block):
                self.index.forget(block)
                self._spare_blocks(size, slab, [block])
                most -= 1

    # ---- sharing and finding

    def share(self, block: int) -> None:
        """One more holder of a block that is held already."""
        self._holders[block] += 1

    def share_many(self, blocks: Iterable[int]) -> None:
        """`share` each."""
        holders = self._holders
        for block in blocks:
            holders[block] += 1

    def claim(self, table: int, key: BlockKey) -> int | None:
        """A holder for the block with this content, where there is one."""
        block = None if self.index is None else self.index.find(table, key)
        if block is None or self.index is None:
            return None
        if block in self._holders:
            self._holders[block] += 1
        else:
            self.index.held(block)
            slab = block // self._steps
            size = self._owner[slab]
            assert size is not None
            self._count_held(size, slab, 1)
            self._holders[block] = 1
        return block

    def is_shared(self, block: int) -> bool:
        """Whether a held block has several holders."""
        return self._holders[block] > 1

    def sole(self, block: int) -> bool:
        """Whether its one holder may write to the block; it can no longer be found by what it held."""
        if self._holders[block] > 1:
            return False
        if self.index is not None:
            self.index.forget(block)
        return True

    # ---- giving back

    def release(self, block: int) -> None:
        """One holder gives the block up."""
        self.release_many((block,))

    def release_many(self, blocks: Iterable[int]) -> None:
        """One holder gives each of these up, in this order."""
        holders, index, each = self._holders, self.index, self._steps
        gone: dict[int, list[int]] = {}  # by slab: free from now on
        for block in blocks:
            count = holders.get(block, 0)
            if count > 1:
                holders[block] = count - 1
            elif count:
                del holders[block]
                slab = block // each
                if index is not None and index.unheld(block):
                    self._count_released(slab, 1)
                elif slab in gone:
                    gone[slab].append(block)
                else:
                    gone[slab] = [block]
            else:
                self._spare_all(gone)
                raise KvikError(f"block {block} is released more often than it is held")
        self._spare_all(gone)

    def _spare_all(self, gone: dict[int, list[int]]) -> None:
        for slab, some in gone.items():
            self._count_released(slab, len(some), filed=False)
            size = self._owner[slab]
            assert size is not None
            self._spare_blocks(size, slab, some)

    # ---- books

    def _count_held(self, size: _Size, slab: int, count: int) -> None:
        """So many blocks of the slab that were not held are held from now on."""
        if self._held_in[slab] == 0:
            self._idle -= 1
            size.loose += size.each
        self._held_in[slab] += count
        size.loose -= count
        size.held += count
        self._file(size, slab)

    def _count_released(self, slab: int, count: int, filed: bool = True) -> None:
        size = self._owner[slab]
        assert size is not None
        self._held_in[slab] -= count
        size.loose += count
        size.held -= count
        if self._held_in[slab] == 0:
            self._idle += 1
            size.loose -= size.each
        if filed:
            self._file(size, slab)

    def _spare_blocks(self, size: _Size, slab: int, blocks: list[int]) -> None:
        """The blocks are neither held nor kept; a slab of which that is true altogether belongs to nobody."""
        spare = self._spare[slab]
        spare += blocks
        if len(spare) == size.each:
            self._spare[slab] = []
            self._owner[slab] = None
            self._idle -= 1
            size.slabs -= 1
            self._free_slabs.append(slab)
        self._file(size, slab)

    def _file(self, size: _Size, slab: int) -> None:
        """Put the slab where `take` looks for it."""
        held, spare = self._held_in[slab], len(self._spare[slab])
        if held and spare:
            size.open[slab] = None
        else:
            size.open.pop(slab, None)
        if 0 < held < size.each - spare:
            size.mixed[slab] = None
        else:
            size.mixed.pop(slab, None)
        if spare and not held:
            size.roomy[slab] = None
        else:
            size.roomy.pop(slab, None)

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Raise KvikError unless held + kept + free = total and every count is that of the tables' blocks."""
        held: dict[int, int] = {}
        for table in tables:
            for block in table:
                held[block] = held.get(block, 0) + 1
        if held != self._holders:
            raise KvikError("block counts differ from the block tables")
        kept = set(self.index.unheld_blocks() if self.index is not None else ())
        if both := kept & held.keys():
            raise KvikError(f"block {min(both)} is held and kept to be found at once")
        books: dict[_Size, list[int]] = {size: [0, 0, 0] for size in self._sizes.values()}  # slabs, held, loose
        idle = seen = 0
        for slab, size in enumerate(self._owner):
            if size is None:
                if self._spare[slab] or self._held_in[slab]:
                    raise KvikError(f"slab {slab} belongs to nobody and has blocks")
                continue
            used = self._check_slab(size, slab, held, kept)
            seen += size.each - len(self._spare[slab])
            idle += used == 0
            count = books[size]
            count[0], count[1], count[2] = count[0] + 1, count[1] + used, count[2] + (size.each - used if used else 0)
        if seen != len(held) + len(kept):
            raise KvikError("some block lies in no slab of its size")
        free = [slab for slab, owner in enumerate(self._owner) if owner is None]
        if sorted(self._free_slabs) != free or idle != self._idle:
            raise KvikError("the counts of free slabs are wrong")
        if any(count != [size.slabs, size.held, size.loose] for size, count in books.items()):
            raise KvikError("the counts of a block size are wrong")

    def _check_slab(self, size: _Size, slab: int, held: dict[int, int], kept: set[int]) -> int:
        """Blocks of the slab that are held; KvikError where its books are wrong."""
        blocks = self._blocks(size, slab)
        used, spare = sum(block in held for block in blocks), self._spare[slab]
        if used != self._held_in[slab] or set(spare) != {b for b in blocks if b not in held and b not in kept}:
            raise KvikError(f"the books of slab {slab} are wrong")
        if len(set(spare)) != len(spare) or len(spare) == size.each:
            raise KvikError(f"the free blocks of slab {slab} are wrong")
        filed = [slab in slabs for slabs in (size.open, size.mixed, size.roomy)]
        if filed != [bool(spare and used), bool(used and len(spare) + used < size.each), bool(spare and not used)]:
            raise KvikError(f"slab {slab} is in the wrong place")
        return used

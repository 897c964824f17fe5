"""Finds blocks by what they hold, so that a prompt's beginning is computed once.

A full block's key is a keyed hash of the key before it and its tokens; before the first is a hash of everything else
that decides a block's bytes (model, layout) and of the request's salt. A packed page is found by the key of the last block
whose tokens it holds. The idea is vLLM's automatic prefix caching (Kwon et al. 2023, section 4.4); all token ids are compared
on a hit, from the first on, so that a collision can give wrong text to nobody. Blocks that no sequence holds stay findable until
their memory is needed, least recently used first.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

from kvik.cache.layout import BLOCK_TOKENS

__all__ = ["BlockKey", "PrefixIndex", "block_keys"]

_KEY_BYTES = 16


class BlockKey:
    """Of a full block: the hash, the tokens' bytes (16 x int32), and the key before it; of a root, layout and salt."""

    __slots__ = ("hash", "previous", "tokens")

    def __init__(self, hash: bytes, tokens: bytes, previous: BlockKey | None) -> None:
        self.hash, self.tokens, self.previous = hash, tokens, previous


def _same(one: BlockKey | None, other: BlockKey | None) -> bool:
    """Whether two keys are of the same tokens, from the first on."""
    while one is not other:
        if one is None or other is None or one.tokens != other.tokens:
            return False
        one, other = one.previous, other.previous
    return True


def _counted(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little") + part


class PrefixIndex:
    """Blocks, by their addresses, by the table they lie in and the key of the last 16 tokens that they hold.

    identity: what decides the bytes of a block beside layout and tokens, the same for all requests.
    """

    def __init__(self, identity: bytes = b"") -> None:
        self._secret = os.urandom(32)  # nobody outside can find tokens that collide
        self._identity = identity
        self._found: dict[tuple[int, bytes], tuple[int, BlockKey]] = {}
        self._keys: dict[int, tuple[int, BlockKey]] = {}  # by block: its table and key
        self._unheld: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._keys)

    def _hash(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=_KEY_BYTES, key=self._secret).digest()

    def root(self, salt: str, layout: str = "") -> BlockKey:
        """The key before a request's first block. Requests with different salts, or layouts (`KVLayout.name`), share nothing."""
        own = _counted(layout.encode()) + salt.encode("utf-8", "surrogatepass")
        return BlockKey(self._hash(_counted(self._identity) + own), own, None)

    def key(self, previous: BlockKey, tokens: Sequence[int]) -> BlockKey:
        """The key of the block with these 16 tokens behind `previous`."""
        ids = np.array(tokens, np.int32).tobytes()
        return BlockKey(self._hash(previous.hash + ids), ids, previous)

    def find(self, table: int, key: BlockKey) -> int | None:
        """The block with this content, or None."""
        found = self._found.get((table, key.hash))
        if found is None or not _same(found[1], key):
            return None
        key.previous = found[1].previous  # the next comparison ends here
        return found[0]

    def add(self, table: int, block: int, key: BlockKey) -> bool:
        """Make a full block findable. False where another has the same content, or this one is known already."""
        if (table, key.hash) in self._found or block in self._keys:
            return False
        self._found[table, key.hash] = (block, key)
        self._keys[block] = (table, key)
        return True

    def has(self, block: int) -> bool:
        return block in self._keys

    def forget(self, block: int) -> None:
        """The block's bytes will change."""
        known = self._keys.pop(block, None)
        if known is not None:
            del self._found[known[0], known[1].hash]
            self._unheld.pop(block, None)

    def held(self, block: int) -> None:
        """A sequence holds the block again."""
        del self._unheld[block]

    def unheld(self, block: int) -> bool:
        """Nobody holds the block any more. True where it is kept to be found."""
        if block not in self._keys:
            return False
        self._unheld[block] = None
        return True

    def unheld_blocks(self) -> Iterator[int]:
        """What nobody holds, least recently used first."""
        return iter(self._unheld)


def block_keys(index: PrefixIndex, root: BlockKey, tokens: Sequence[int], known: list[BlockKey], count: int) -> None:
    """Extend `known`, the keys of a sequence's first full blocks, to its first `count` blocks."""
    while len(known) < count:
        at = len(known) * BLOCK_TOKENS
        previous = known[-1] if known else root
        known.append(index.key(previous, tokens[at : at + BLOCK_TOKENS]))

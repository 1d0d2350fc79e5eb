"""The pool of KV blocks: who holds each block, which prefixes can be reused, what comes next.

A block is in one of three states, and used + cached + free == total after every call:

    used    num_references >= 1: held by running sequences; a shared one is full and only read
    cached  num_references == 0, published under a digest: reusable, given up in LRU order
    free    num_references == 0, unpublished

A block has one writer, the sequence that allocated it; `publish` is called once it is full, and
only published blocks are ever shared.

Sequences get neighbouring blocks where possible, so that the keys of a sequence are one slice of
the pool's memory and need not be gathered.
"""

from __future__ import annotations

import array
import bisect
import collections
import hashlib
from collections.abc import Iterable, Sequence

from flashserve.types import KVUsage

_DIGEST_BYTES = 16


def root_digest(salt: str) -> bytes:
    """What a chain of block digests starts from; the prefixes of two salts never meet."""
    return hashlib.blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()


def chain_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a full block, given that of the block before it.

    A cryptographic hash, because a collision would hand one user's context to another.
    """
    content = array.array("q", tokens).tobytes()
    return hashlib.blake2b(content, key=parent, digest_size=_DIGEST_BYTES).digest()


class BlockPool:
    """Allocates blocks 0 .. num_blocks - 1 of `block_tokens` tokens each."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._free = _FreeRuns(num_blocks)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: the free ones and the cached ones."""
        return len(self._free) + len(self._cached)

    def usage(self) -> KVUsage:
        free, cached = len(self._free), len(self._cached)
        return KVUsage(self.num_blocks, self.num_blocks - free - cached, cached, free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def allocate(self, after: int | None = None) -> int:
        """A block with one reference, the neighbour of block `after` if that is free.

        The least recently used cached block is given up when none is free. The caller has seen
        num_available > 0.
        """
        if not self._free:
            victim, _ = self._cached.popitem(last=False)
            self._forget(victim)
            self._free.add(victim)
        neighbour = None if after is None else after + 1
        block = neighbour if neighbour in self._free else self._free.roomiest()
        assert block is not None
        self._free.remove(block)
        self._references[block] = 1
        return block

    def find(self, digest: bytes) -> int | None:
        """The block that holds the tokens of `digest`, if any still does."""
        return self._by_digest.get(digest)

    def is_used(self, block: int) -> bool:
        return self._references[block] > 0

    def share(self, block: int) -> None:
        """Adds a reference to a published block."""
        assert self._digests[block] is not None
        self._references[block] += 1
        self._cached.pop(block, None)

    def publish(self, block: int, digest: bytes) -> None:
        """Makes a full block of the caller's findable. A second block of equal content is not."""
        if digest not in self._by_digest and self._digests[block] is None:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def release(self, blocks: Iterable[int]) -> None:
        """Gives one reference of each block back, listed in the sequence's order.

        The last blocks become the least recent, so that a chain is given up from its end.
        """
        for block in reversed(list(blocks)):
            assert self._references[block] > 0
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._digests[block] is None:
                    self._free.add(block)
                else:
                    self._cached[block] = None

    def drop_cached(self) -> None:
        """Forgets every reusable prefix that no sequence holds."""
        while self._cached:
            block, _ = self._cached.popitem()
            self._forget(block)
            self._free.add(block)

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        assert digest is not None
        del self._by_digest[digest]
        self._digests[block] = None


class _FreeRuns:
    """The free blocks as sorted, disjoint, non-touching runs [start, end)."""

    def __init__(self, num_blocks: int) -> None:
        self._starts: list[int] = [0] if num_blocks else []
        self._ends: list[int] = [num_blocks] if num_blocks else []
        self._count = num_blocks

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block: object) -> bool:
        if not isinstance(block, int):
            return False
        index = bisect.bisect_right(self._starts, block) - 1
        return index >= 0 and block < self._ends[index]

    def add(self, block: int) -> None:
        index = bisect.bisect_right(self._starts, block)  # the run that would follow
        joins_left = index > 0 and self._ends[index - 1] == block
        joins_right = index < len(self._starts) and self._starts[index] == block + 1
        if joins_left and joins_right:
            self._ends[index - 1] = self._ends[index]
            del self._starts[index], self._ends[index]
        elif joins_left:
            self._ends[index - 1] = block + 1
        elif joins_right:
            self._starts[index] = block
        else:
            self._starts.insert(index, block)
            self._ends.insert(index, block + 1)
        self._count += 1

    def remove(self, block: int) -> None:
        index = bisect.bisect_right(self._starts, block) - 1
        start, end = self._starts[index], self._ends[index]
        assert start <= block < end
        parts = [(a, b) for a, b in ((start, block), (block + 1, end)) if a < b]
        self._starts[index : index + 1] = [a for a, _ in parts]
        self._ends[index : index + 1] = [b for _, b in parts]
        self._count -= 1

    def roomiest(self) -> int:
        """Where a new sequence starts: in the longest run, not next to one that may grow."""
        start, end = max(
            zip(self._starts, self._ends, strict=True), key=lambda run: (run[1] - run[0], -run[0])
        )
        return start if start == 0 else start + (end - start) // 2

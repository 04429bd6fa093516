"""The KV block pool: who holds which block, and which free block is given away next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """Reference-counted block ids.

    A block is *held* while its count is above zero. A free block may still carry a prefix-cached content: such blocks
    are kept apart, in the order in which they were let go, and are given away only when no plain free block is left
    (least recently used first); `on_evict` is then told so that the cache forgets the content.
    """

    def __init__(self, first_block_id: int, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        if not 0 <= first_block_id < num_blocks:
            raise ValueError(f"no usable blocks: ids start at {first_block_id} and end below {num_blocks}")
        self.first_block_id = first_block_id
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._num_holders = [0] * num_blocks
        self._cached = bytearray(num_blocks)  # 1: content is in the prefix cache
        # Taken from the end; lower ids first on a fresh pool, which keeps early allocations together.
        self._plain_free = list(range(num_blocks - 1, first_block_id - 1, -1))
        self._cached_free: OrderedDict[int, None] = OrderedDict()

    @property
    def num_usable(self) -> int:
        return self.num_blocks - self.first_block_id

    @property
    def num_free(self) -> int:
        return len(self._plain_free) + len(self._cached_free)

    @property
    def num_blank(self) -> int:
        """Free blocks without a cached content."""
        return len(self._plain_free)

    @property
    def num_held(self) -> int:
        return self.num_usable - self.num_free

    def num_holders(self, block_id: int) -> int:
        return self._num_holders[block_id]

    def take(self) -> int:
        """A free block, with one holder. The caller has checked that there is one."""
        if self._plain_free:
            block_id = self._plain_free.pop()
        else:
            block_id, _ = self._cached_free.popitem(last=False)
            self._cached[block_id] = 0
            self._on_evict(block_id)
        self._num_holders[block_id] = 1
        return block_id

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one holder. The caller has checked `num_free`."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks wanted, {self.num_free} free")
        return [self.take() for _ in range(count)]

    def retain(self, block_ids: Iterable[int]) -> None:
        """Add a holder to each block, reviving those that are free with cached content."""
        for block_id in block_ids:
            if self._num_holders[block_id] == 0:
                del self._cached_free[block_id]
            self._num_holders[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Remove a holder from each block. Pass the last position first: tails are then evicted before heads."""
        for block_id in block_ids:
            holders = self._num_holders[block_id] - 1
            if holders < 0:
                raise ValueError(f"block {block_id} is released but nobody holds it")
            self._num_holders[block_id] = holders
            if holders == 0:
                if self._cached[block_id]:
                    self._cached_free[block_id] = None
                else:
                    self._plain_free.append(block_id)

    def mark_cached(self, block_id: int) -> None:
        """The block's content is now in the prefix cache. It must be held."""
        self._cached[block_id] = 1

    def mark_uncached(self, block_id: int) -> None:
        """The prefix cache has forgotten the block's content. It must be held."""
        self._cached[block_id] = 0

    def check_integrity(self, holders: dict[int, int]) -> None:
        """Raise if the books disagree with `holders`, a count of holders per block made by whoever holds them."""
        for block_id in range(self.first_block_id, self.num_blocks):
            expected = holders.get(block_id, 0)
            if self._num_holders[block_id] != expected:
                raise RuntimeError(
                    f"block {block_id} has {self._num_holders[block_id]} holders on the books, {expected} in fact"
                )
        free = set(self._plain_free) | set(self._cached_free)
        if len(free) != self.num_free:
            raise RuntimeError("a block is in the free lists twice")
        held = {block_id for block_id, count in holders.items() if count}
        if free & held or len(free) + len(held) != self.num_usable:
            raise RuntimeError(f"{len(free)} free and {len(held)} held blocks do not make {self.num_usable}")
        if any(self._cached[block_id] for block_id in self._plain_free):
            raise RuntimeError("a plain free block is marked as cached")

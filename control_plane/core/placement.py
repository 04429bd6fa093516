"""Where running sequences live on the worker: rows and blocks, and which block contents can be shared.

The scheduler decides who runs; this keeps the books of where. Rows and blocks that a sequence gives up may still be
touched by steps in flight: its row is dropped by the next step, which is later than those, and its blocks are free only
once they have retired.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import takewhile

from control_plane.core.kv_blocks import BlockPool
from control_plane.core.prefix_cache import BlockHash, PrefixCache, extend_chain
from control_plane.core.sequence import NEVER, NO_ROW, SequenceState

# Generated blocks that enter the prefix cache together: a quarter of the work, and caches are cold each time.
_NUM_NAMED_TOGETHER = 4


class Placement:
    """The rows and blocks of one worker, as of one session."""

    def __init__(self, first_block_id: int, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        self._block_size = block_size
        self._cache = PrefixCache()
        self._pool = BlockPool(first_block_id, num_blocks, self._cache.forget)
        self._max_num_seqs = max_num_seqs
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._drop_rows: list[int] = []
        # Blocks let go while steps that may touch them are in flight: (last such step, blocks).
        self._deferred: deque[tuple[int, list[int]]] = deque()
        # Contents that a running prefill will have put into the cache soon.
        self._computing: dict[BlockHash, SequenceState] = {}

    @property
    def num_blocks_held(self) -> int:
        return self._pool.num_held

    @property
    def num_usable_blocks(self) -> int:
        return self._pool.num_usable

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cache)

    @property
    def num_blank_blocks(self) -> int:
        return self._pool.num_blank

    def num_known_blocks(self, hashes: Sequence[BlockHash]) -> int:
        """Length of the longest prefix of the chain whose contents are here, or will be when a running prefill ends."""
        num_cached = len(self._cache.match(hashes))
        return num_cached + sum(1 for _ in takewhile(self._computing.__contains__, hashes[num_cached:]))

    @property
    def has_free_row(self) -> bool:
        return bool(self._free_rows)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def has_free_block(self) -> bool:
        return self._pool.num_free > 0

    def num_missing_blocks(self, sequence: SequenceState) -> int:
        """How many more than the free ones it needs to be placed, if nothing of it is cached; below 0: none."""
        return -(-sequence.num_total // self._block_size) - self._pool.num_free

    @property
    def expects_blocks_back(self) -> bool:
        """Whether steps in flight still hold blocks that nobody owns any more."""
        return bool(self._deferred)

    def take_drop_rows(self) -> list[int]:
        """Rows given up since the last step: the next one drops them."""
        rows, self._drop_rows = self._drop_rows, []
        return rows

    def shared_prefix(self, sequence: SequenceState) -> tuple[list[BlockHash], list[int]] | None:
        """Hashes of the sequence's blocks that could be shared, and the cached blocks of the longest such prefix.

        None while another sequence computes the very next block: waiting for it beats computing it twice. Nothing is
        shared with a sequence whose prompt's logprobs are wanted: they come of computing it.
        """
        hashes = self._sharable_hashes(sequence)
        if sequence.num_prompt_logprobs_left:
            return hashes, []
        cached = self._cache.match(hashes)
        if len(cached) < len(hashes) and hashes[len(cached)] in self._computing:
            return None
        return hashes, cached

    def place(self, sequence: SequenceState, hashes: Sequence[BlockHash], cached: list[int], headroom: int) -> bool:
        """Give the sequence a row, its cached blocks and fresh ones for all its known tokens: a prefill that starts can
        finish. False, and nothing done, if that would not leave `headroom` blocks free."""
        block_size = self._block_size
        num_blocks = -(-sequence.num_total // block_size)
        num_fresh = num_blocks - len(cached)
        self._pool.retain(cached)
        if self._pool.num_free < num_fresh + headroom:
            self._pool.release(reversed(cached))
            return False
        sequence.row = self._free_rows.pop()
        sequence.block_ids = cached + self._pool.allocate(num_fresh)
        sequence.capacity = num_blocks * block_size
        sequence.num_computed = sequence.num_retired = len(cached) * block_size
        sequence.asks_prompt_logprobs = sequence.num_prompt_logprobs_left > 0
        sequence.quiet_until = 0
        if sequence.request.root_hash is not None:
            sequence.num_named = len(cached)
            sequence.next_hash_at = (len(cached) + 1) * block_size
            sequence.computing = [
                h for h in hashes[len(cached) :] if self._computing.setdefault(h, sequence) is sequence
            ]
        return True

    def grow(self, sequence: SequenceState) -> int:
        """One more block at the end of the sequence's table; there must be a free one."""
        block_id = self._pool.take()
        sequence.block_ids.append(block_id)
        sequence.capacity += self._block_size
        return block_id

    def displace(self, sequence: SequenceState, last_step_in_flight: int | None) -> None:
        """Take the sequence's row and blocks away. What it has computed stays to be shared."""
        if sequence.next_hash_at != NEVER:
            self.share_computed_blocks(sequence)
        self._drop_rows.append(sequence.row)
        self._free_rows.append(sequence.row)
        sequence.row = NO_ROW
        sequence.quiet_until = 0
        for block_hash in sequence.computing:
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]
        sequence.computing = []
        sequence.next_hash_at = NEVER
        block_ids, sequence.block_ids, sequence.capacity = sequence.block_ids, [], 0
        if last_step_in_flight is None:
            self._pool.release(reversed(block_ids))
        else:
            self._deferred.append((last_step_in_flight, block_ids))

    def retire(self, step_id: int) -> None:
        """The step's result has come: blocks that waited for it are free."""
        while self._deferred and self._deferred[0][0] <= step_id:
            self._pool.release(reversed(self._deferred.popleft()[1]))

    def share_computed_blocks(self, sequence: SequenceState) -> None:
        """Enter the sequence's newly computed full blocks into the cache; called at `next_hash_at`."""
        num_full = sequence.num_retired // self._block_size
        self._extend_hashes(sequence, num_full)
        hashes, block_ids = sequence.block_hashes, sequence.block_ids
        for index in range(sequence.num_named, num_full):
            block_hash, block_id = hashes[index], block_ids[index]
            if self._cache.insert(block_hash, block_id):
                self._pool.mark_cached(block_id)
            if self._computing and self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]
        sequence.num_named = num_full
        # Others may wait for a block whose name is known; what is generated is named several blocks at a time.
        num_more = 1 if len(hashes) > num_full else _NUM_NAMED_TOGETHER
        sequence.next_hash_at = (num_full + num_more) * self._block_size

    def forget_contents(self, sequence: SequenceState) -> None:
        """Take the contents of the sequence's blocks out of the prefix cache, for good."""
        sequence.next_hash_at = NEVER
        for block_id in sequence.block_ids:
            if self._cache.holds(block_id):
                self._cache.forget(block_id)
                self._pool.mark_uncached(block_id)

    def _sharable_hashes(self, sequence: SequenceState) -> list[BlockHash]:
        """Hashes of all full blocks, but one token at least is left to run."""
        if sequence.request.root_hash is None:
            return []
        num_blocks = (sequence.num_known - 1) // self._block_size
        self._extend_hashes(sequence, num_blocks)
        return sequence.block_hashes[:num_blocks]

    def _extend_hashes(self, sequence: SequenceState, num_blocks: int) -> None:
        """Hash the sequence's known tokens at least up to its first `num_blocks` full blocks."""
        hashes, root = sequence.block_hashes, sequence.request.root_hash
        if root is not None and len(hashes) < num_blocks:
            extend_chain(hashes, root, sequence.token_ids(len(hashes) * self._block_size), self._block_size)

    def check_integrity(self, running: Sequence[SequenceState]) -> None:
        """Raise if the books disagree with the sequences that run."""
        holders: dict[int, int] = {}
        for block_ids in [sequence.block_ids for sequence in running] + [ids for _, ids in self._deferred]:
            for block_id in block_ids:
                holders[block_id] = holders.get(block_id, 0) + 1
        self._pool.check_integrity(holders)
        self._cache.check_integrity()
        if sorted([sequence.row for sequence in running] + self._free_rows) != list(range(self._max_num_seqs)):
            raise RuntimeError("running sequences and free rows do not make the row table")
        for sequence in running:
            for block_id in sequence.block_ids[sequence.num_retired // self._block_size :]:
                if self._pool.num_holders(block_id) != 1:
                    raise RuntimeError(f"block {block_id} is shared but still written by sequence {sequence.sort_key}")
        if not set(self._computing.values()) <= set(running):
            raise RuntimeError("a block content is awaited from a sequence that is not running")

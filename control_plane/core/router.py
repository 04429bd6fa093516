"""Which worker group a request goes to. Pure: looks at numbers, decides, remembers nothing.

Every group has its own block pool and prefix cache, so where a request goes decides how much of its prompt is computed
again and how long it waits. Both are measured in the same unit, tokens that have to run on the group first:

    cost = (prompt tokens - cached tokens)                 what the request itself brings
         + queued tokens                                   prompts that wait there, and the rest of prefills that run
         + 64 * sequences                                  each running or waiting sequence takes a token of every step
         + 4 * block_size * missing blocks                 others have to end, or are recomputed, before it fits

The lowest cost wins. A cached prefix is worth what it saves and not more: a group is never chosen whose load is above
another one's by more tokens than the cache spares the request (unless the other would make it wait for a row or for
blocks while the chosen one can start it now).

64 stands for what a sequence has still to generate, which nobody knows: a shared prefix of 1,024 tokens therefore
tolerates 16 sequences more on the group that holds it, and the seventeenth is computed again elsewhere, after which
both groups hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TOKENS_PER_SEQUENCE = 64
TOKENS_PER_MISSING_TOKEN = 4


@dataclass(frozen=True, slots=True)
class RequestNeeds:
    """What a request brings to whichever group takes it."""

    num_tokens: int  # known token ids, prompt and output so far: all of them are run, or found in the cache
    num_sequences: int = 1
    # Has been in the batch of lost workers and is going to be tried alone (see `scheduler`).
    is_suspect: bool = False


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """One group as the router sees it, for one request."""

    num_cached_tokens: int  # of this request's
    num_queued_tokens: int
    num_sequences: int  # running and waiting
    max_num_seqs: int
    num_free_blocks: int
    # Of the free blocks, those whose content nobody could want back.
    num_blank_blocks: int
    block_size: int
    # Sequences that are to be tried alone: nothing else runs there until they are through.
    num_suspects: int = 0

    def num_missing_blocks(self, needs: RequestNeeds) -> int:
        """Blocks that the request needs beyond those that are free once everything queued has got its own."""
        size = self.block_size
        wanted = -(-needs.num_tokens // size) - self.num_cached_tokens // size + needs.num_sequences
        spoken_for = -(-self.num_queued_tokens // size)
        return max(0, wanted + spoken_for - self.num_free_blocks)

    def load(self, needs: RequestNeeds) -> int:
        """Tokens that come before the request's own."""
        missing = self.num_missing_blocks(needs) * self.block_size
        return self.num_queued_tokens + TOKENS_PER_SEQUENCE * self.num_sequences + TOKENS_PER_MISSING_TOKEN * missing

    def cost(self, needs: RequestNeeds) -> int:
        return needs.num_tokens - self.num_cached_tokens + self.load(needs)

    def must_wait(self, needs: RequestNeeds) -> bool:
        """Whether the request cannot start before something else has ended."""
        no_row = self.num_sequences + needs.num_sequences > self.max_num_seqs
        return no_row or self.num_missing_blocks(needs) > 0


def choose_group(needs: RequestNeeds, groups: Sequence[GroupLoad]) -> int:
    """Index of the group that takes the request; `groups` must not be empty.

    Suspects gather in one group, so that the others go on undisturbed; what is under no suspicion stays away from it
    while there is another. Among equals the emptiest cache takes the request, so that all caches fill.
    """

    def key(index: int) -> tuple[int, ...]:
        group = groups[index]
        is_misplaced = (group.num_suspects == 0) == needs.is_suspect
        return (
            is_misplaced,
            group.must_wait(needs),
            group.cost(needs),
            group.num_sequences,
            -group.num_blank_blocks,
            index,
        )

    return min(range(len(groups)), key=key)

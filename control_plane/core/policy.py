"""Who runs first and who gives way: the two choices in which scheduling policies differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from control_plane.core.sequence import SequenceState

PolicyName = Literal["fcfs", "priority"]

# From this priority on a request is background work: it runs after everything else under every policy, and gives its
# row and blocks up to whoever waits for them.
BACKGROUND_PRIORITY = 1_000_000


def is_background(sequence: SequenceState) -> bool:
    return sequence.request.request.priority >= BACKGROUND_PRIORITY


def sort_key(policy: PolicyName, sequence: SequenceState) -> tuple[int, ...]:
    """Order of sequences, lower first: a total order that never changes while a request lives.

    A preempted sequence keeps its key and so returns to the front. The first sequence in this order is never preempted,
    which is why every sequence is served at last.
    """
    request = sequence.request
    if policy == "priority":
        return (request.request.priority, request.arrival, sequence.index)
    return (is_background(sequence), request.arrival, sequence.index)


def choose_victim(policy: PolicyName, candidates: Sequence[SequenceState]) -> SequenceState:
    """Which of `candidates` (in order, all later than whoever needs the blocks) is recomputed later.

    The least important one; among equals the one that loses the least work, which is the one with the fewest computed
    tokens, and among those the latest.
    """
    if policy == "priority":
        lowest = max(candidate.request.request.priority for candidate in candidates)
        candidates = [candidate for candidate in candidates if candidate.request.request.priority == lowest]
    elif is_background(candidates[-1]):
        candidates = [candidate for candidate in candidates if is_background(candidate)]
    return min(candidates, key=lambda candidate: (candidate.num_computed, tuple(-part for part in candidate.sort_key)))

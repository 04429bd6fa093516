"""Who runs first, who gives way, and how much of the prompts that wait a step takes along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from control_plane.core.sequence import SequenceState

PolicyName = Literal["fcfs", "priority"]

# From this priority on a request is background work: it runs after everything else under every policy, and gives its
# row and blocks up to whoever waits for them.
BACKGROUND_PRIORITY = 1_000_000

# In so many steps a backlog of prompts is worked off while other requests generate, if it does not grow.
BACKLOG_STEPS = 8
# What steps with prompts are filled up to: workers pad a step's tokens, and multiples of this little or not at all.
STEP_MULTIPLE = 256


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


def mixed_step_size(num_decodes: int, num_prompt_tokens: int, at_least: int) -> int:
    """How many tokens to run in a step in which `num_decodes` requests generate and so many prompt tokens wait.

    A decode step reads every weight whatever it computes, so that the first few hundred prompt tokens in it cost the
    device little; beyond those each costs about the same in any step. So prompts are spread over the steps that there
    are anyway, `at_least` tokens each, and no request waits for its next token longer than need be. The larger the
    backlog, the larger the part: a burst is not made to wait for its first tokens.

    Idea: Agrawal et al., "Taming throughput-latency tradeoff in LLM inference with Sarathi-Serve", 2024.
    """
    part = max(STEP_MULTIPLE, -(-num_prompt_tokens // BACKLOG_STEPS))
    size = -(-max(at_least, num_decodes + part) // STEP_MULTIPLE) * STEP_MULTIPLE
    # A small rest would be a step of its own.
    rest = num_decodes + num_prompt_tokens
    return rest if rest <= size + (size - num_decodes) // 4 else size

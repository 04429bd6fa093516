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
BACKLOG_STEPS = 32
# Prompt tokens that such a step takes at least, and what its size is a multiple of: workers pad steps to that.
MIN_PROMPT_PART = 256
STEP_MULTIPLE = 128
# Operations that a device does in the time it takes to read a byte, in bfloat16: 220 on an H100 and 185 on an H200 by
# measured rates. Only the order of magnitude matters.
_OPERATIONS_PER_BYTE = 200


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


def context_per_prompt_token(weights_per_token: int, kv_bytes_per_token: float) -> int:
    """Tokens of context that take a device as long to read as one prompt token takes to compute; 0: not known."""
    if not weights_per_token or not kv_bytes_per_token:
        return 0
    return max(1, round(2 * weights_per_token / (kv_bytes_per_token * _OPERATIONS_PER_BYTE)))


def mixed_step_size(num_decodes: int, decode_cost: int, num_prompt_tokens: int, at_least: int) -> int:
    """How many tokens to run in a step in which some requests generate and others' prompts wait.

    A step reads every weight whatever it computes, so that the first few hundred prompt tokens beside some decodes cost
    a device little, and further ones as much as anywhere. So prompts are spread over the steps that there are anyway:
    no request waits for its next token longer than need be, and few steps are without prompts as long as some wait.
    A step grows to `at_least` tokens, or by as many as cost no more than reading the context of its decodes does, so
    that a small model with much context is not held up by its many steps; and a backlog is not allowed to last.

    Args:
        decode_cost: prompt tokens that take as long to compute as the decodes' context to read.
        num_prompt_tokens: of all prompts that could be run now.

    Idea: Agrawal et al., "Taming throughput-latency tradeoff in LLM inference with Sarathi-Serve", 2024.
    """
    backlog_part = -(-num_prompt_tokens // BACKLOG_STEPS)
    part = max(MIN_PROMPT_PART, at_least - num_decodes, decode_cost, backlog_part)
    size = -(-(num_decodes + part) // STEP_MULTIPLE) * STEP_MULTIPLE
    # A small rest would be a step of its own.
    everything = num_decodes + num_prompt_tokens
    return everything if everything <= size + (size - num_decodes) // 4 else size

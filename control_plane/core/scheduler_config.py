"""What a scheduler is given, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass

from control_plane.core.policy import PolicyName


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What the worker has, and how it is to be used."""

    first_block_id: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    policy: PolicyName = "fcfs"
    enable_prefix_caching: bool = True
    shares_blocks: bool = True
    """Whether a sequence may begin with what another has computed; False: not even a request's own siblings do."""
    mixed_step_tokens: int = 512
    """What a step is filled up to with prompts while others generate; see `policy.mixed_step_size`."""
    context_per_prompt_token: int = 0
    """Tokens of context that cost the worker as much as one prompt token; 0: not known."""
    # Prompts of requests that pool run in one step.
    whole_prompts: bool = False
    num_stages: int = 1
    """Steps that the worker computes at the same time, each in another stage."""

    @property
    def wanted_in_flight(self) -> int:
        """Steps in flight below which a stage would wait: one in each, and one on its way."""
        return self.num_stages + 1 if self.num_stages > 1 else 1


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start, for whoever exports them."""

    num_preemptions: int = 0
    num_prefix_queries: int = 0  # tokens looked up
    num_prefix_hits: int = 0  # tokens found
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_discarded_tokens: int = 0  # sampled after their sequence had ended
    num_recomputed_tokens: int = 0  # run again after a preemption or a lost worker

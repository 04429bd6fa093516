"""Policy of the core; what a worker has comes from the worker."""

from __future__ import annotations

from dataclasses import dataclass

from control_plane.core.policy import PolicyName


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The same for every group. The queue's bounds are for all of them together."""

    max_num_batched_tokens: int | None = None
    mixed_step_tokens: int = 512
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    scheduling_policy: PolicyName = "fcfs"
    enable_prefix_caching: bool = True
    steps_in_flight: int = 2
    step_timeout_s: float = 60.0

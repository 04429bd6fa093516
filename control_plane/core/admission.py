"""What is let into the queue: bounded by requests and tokens; nothing that cannot fit is ever queued."""

from __future__ import annotations

from dataclasses import dataclass

from control_plane.core.request import AdmissionError, CoreRequest


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    max_queued_requests: int
    max_queued_tokens: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_usable_blocks: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """How full the queue is, and how fast it empties."""

    num_requests: int
    num_tokens: int
    prompt_tokens_per_s: float


def check_admission(request: CoreRequest, limits: AdmissionLimits, load: QueueLoad) -> None:
    """Raise `AdmissionError` with a reason, and with a retry time where waiting helps."""
    check_fits(request, limits)
    check_queue(request, limits, load)


def check_fits(request: CoreRequest, limits: AdmissionLimits) -> None:
    """Raise `AdmissionError` for what a worker with these limits could not run even if it had nothing else to do."""
    num_prompt_tokens = len(request.prompt_ids)
    if request.pooling is not None and num_prompt_tokens > limits.max_model_len:
        raise AdmissionError(
            "context_length_exceeded",
            f"the input has {num_prompt_tokens} tokens, but this model takes {limits.max_model_len}",
            code="INVALID_ARGUMENT",
            field="input",
        )
    # Nothing is drawn where vectors are wanted.
    num_tokens = num_prompt_tokens + (request.max_tokens if request.pooling is None else 0)
    if num_tokens > limits.max_model_len:
        raise AdmissionError(
            "context_length_exceeded",
            f"{num_prompt_tokens} prompt tokens and {request.max_tokens} tokens to generate make {num_tokens}, "
            f"but this model's context holds {limits.max_model_len}",
            code="INVALID_ARGUMENT",
            field="stop.max_tokens" if num_prompt_tokens < limits.max_model_len else "input",
        )
    # The last sampled token is never run, so its KV needs no room.
    num_blocks = -(-(num_tokens - 1) // limits.block_size)
    if num_blocks > limits.num_usable_blocks:
        raise AdmissionError(
            "context_length_exceeded",
            f"{num_prompt_tokens} prompt tokens and {request.max_tokens} tokens to generate need {num_blocks} "
            f"KV blocks, but the worker has {limits.num_usable_blocks}: ask for fewer tokens",
            code="INVALID_ARGUMENT",
            field="stop.max_tokens",
        )
    if request.num_sequences > limits.max_num_seqs:
        raise AdmissionError(
            "too_many_sequences",
            f"n is {request.num_sequences}, but at most {limits.max_num_seqs} sequences run at a time",
            code="INVALID_ARGUMENT",
            field="n",
        )


def check_queue(request: CoreRequest, limits: AdmissionLimits, load: QueueLoad) -> None:
    """Raise `AdmissionError` while the queue is full; `load` is that of all groups together."""
    num_prompt_tokens = len(request.prompt_ids)
    full = None
    if load.num_requests >= limits.max_queued_requests:
        full = f"{load.num_requests} requests are waiting, the limit is {limits.max_queued_requests}"
    elif load.num_requests and load.num_tokens + num_prompt_tokens > limits.max_queued_tokens:
        full = f"{load.num_tokens} prompt tokens are waiting, the limit is {limits.max_queued_tokens}"
    if full:
        wait_s = retry_after_s(load)
        raise AdmissionError(
            "queue_full",
            f"the queue is full: {full}; try again in {wait_s:.0f} s",
            code="RESOURCE_EXHAUSTED",
            retry_after_s=wait_s,
        )


def retry_after_s(load: QueueLoad) -> float:
    """When about a tenth of what is waiting will have been taken up, between 1 and 60 s."""
    if load.prompt_tokens_per_s <= 0:
        return 5.0
    return min(60.0, max(1.0, 0.1 * load.num_tokens / load.prompt_tokens_per_s))

"""What a worker's description means to the core: facts for the frontend, books for the scheduler, limits for admission;
and whether it may work beside the groups that are there already."""

from __future__ import annotations

from collections.abc import Iterable

from stepwire.v1 import worker_pb2

from control_plane.core.admission import AdmissionLimits
from control_plane.core.engine_config import EngineConfig
from control_plane.core.policy import context_per_prompt_token
from control_plane.core.request import ModelFacts, PoolingFacts
from control_plane.core.scheduler_config import SchedulerConfig
from control_plane.core.worker_link import WorkerRefused


def num_usable_blocks(worker: worker_pb2.DescribeResponse) -> int:
    return worker.num_blocks - worker.first_block_id


def model_facts(worker: worker_pb2.DescribeResponse, config: EngineConfig) -> ModelFacts:
    # A sequence has to fit the pool as well as the context.
    max_model_len = min(worker.max_model_len, num_usable_blocks(worker) * worker.block_size)
    if worker.pooling.whole_prompts:
        max_model_len = min(max_model_len, _token_budget(worker, config))
    return ModelFacts(
        model=worker.model,
        max_model_len=max_model_len,
        vocab_size=worker.vocab_size,
        max_num_logprobs=worker.max_num_logprobs,
        can_mask_tokens=worker_pb2.CAPABILITY_TOKEN_MASK in worker.capabilities,
        can_prompt_logprobs=worker_pb2.CAPABILITY_PROMPT_LOGPROBS in worker.capabilities,
        pooling=_pooling_facts(worker),
    )


def scheduler_config(worker: worker_pb2.DescribeResponse, config: EngineConfig) -> SchedulerConfig:
    return SchedulerConfig(
        first_block_id=worker.first_block_id,
        num_blocks=worker.num_blocks,
        block_size=worker.block_size,
        max_num_seqs=worker.max_num_seqs,
        max_num_batched_tokens=_token_budget(worker, config),
        mixed_step_tokens=config.mixed_step_tokens,
        context_per_prompt_token=context_per_prompt_token(
            worker.weights_per_token, worker.block_bytes / worker.block_size
        ),
        policy=config.scheduling_policy,
        enable_prefix_caching=config.enable_prefix_caching and not worker.keeps_row_states,
        shares_blocks=not worker.keeps_row_states,
        whole_prompts=worker.pooling.whole_prompts,
        num_stages=max(1, worker.num_stages),
    )


def _token_budget(worker: worker_pb2.DescribeResponse, config: EngineConfig) -> int:
    budget = min(config.max_num_batched_tokens or worker.max_num_batched_tokens, worker.max_num_batched_tokens)
    if not worker.buckets:
        return budget
    # A full step fills its bucket: more would be padded up to the next.
    return max((bucket for bucket in worker.buckets if bucket <= budget), default=worker.buckets[0])


def _pooling_facts(worker: worker_pb2.DescribeResponse) -> PoolingFacts | None:
    if not worker.HasField("pooling"):
        return None
    pooling = worker.pooling
    is_score = pooling.kind == worker_pb2.POOLING_KIND_SCORE
    return PoolingFacts(is_score=is_score, dimensions=pooling.dimensions, only=pooling.only)


def admission_limits(worker: worker_pb2.DescribeResponse, facts: ModelFacts, config: EngineConfig) -> AdmissionLimits:
    return AdmissionLimits(
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        max_model_len=facts.max_model_len,
        max_num_seqs=worker.max_num_seqs,
        block_size=worker.block_size,
        num_usable_blocks=num_usable_blocks(worker),
        vocab_size=worker.vocab_size,
    )


def check_may_serve(
    worker: worker_pb2.DescribeResponse,
    config: EngineConfig,
    facts: ModelFacts | None,
    others: Iterable[worker_pb2.DescribeResponse],
) -> None:
    """Raise `WorkerRefused` unless the worker can serve what was promised, and what the other groups serve.

    `facts` is what clients were told of the first worker. A request may move from group to group in the middle of its
    output, so that whatever shows in tokens has to be the same everywhere; the size of the KV pool need not be.
    """
    offered = model_facts(worker, config)
    differences = []
    if facts is not None:
        for name in (
            "model",
            "vocab_size",
            "max_num_logprobs",
            "can_mask_tokens",
            "can_prompt_logprobs",
            "pooling",
        ):
            if getattr(offered, name) != getattr(facts, name):
                differences.append((name, getattr(offered, name), getattr(facts, name)))
        if offered.max_model_len < facts.max_model_len:
            differences.append(("max_model_len", offered.max_model_len, facts.max_model_len))
    for other in others:
        for name in ("version", "architecture", "dtype", "kv_cache_dtype", "block_size"):
            if getattr(worker, name) != getattr(other, name):
                differences.append((name, getattr(worker, name), getattr(other, name)))
        break
    if differences:
        told = ", ".join(f"{name} {theirs!r} instead of {ours!r}" for name, theirs, ours in differences)
        raise WorkerRefused(
            f"it has {told}: every worker of one control plane must serve the same model in the same way; "
            "start it with the others' model, version and flags, or give it a control plane of its own"
        )

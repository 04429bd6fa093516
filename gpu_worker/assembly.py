"""What every runner of a real model is put together from: sizes, weights, memory plan and the facts to announce."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import torch

from gpu_worker.attention.api import AttentionSpec
from gpu_worker.config import WorkerSettings
from gpu_worker.device import available_host_bytes, device_label, dtype_name
from gpu_worker.kv_cache import (
    FIRST_BLOCK_ID,
    KVCacheShape,
    MemoryPlan,
    activation_bytes,
    longest_sequence,
    plan_cpu_memory,
    plan_cuda_memory,
)
from gpu_worker.kv_places import caching_layers, differing_heads
from gpu_worker.layers.linear import BuildContext
from gpu_worker.loading.kv_scales import KVScales
from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.loader import check_weights, fill_random, load_weights
from gpu_worker.models.matched_checkpoint import spec_as_stored
from gpu_worker.parallel.process_group import RankGroup
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.pooling import PoolingSpec
from gpu_worker.row_table import BatchLimits
from gpu_worker.runner_api import PoolingFacts, PoolingKind, WorkerFacts
from gpu_worker.state_pool import StateShape

log = structlog.get_logger(__name__)

MAX_NUM_LOGPROBS = 20
DEFAULT_BLOCK_SIZE = {"cpu": 16, "cuda": 64}
DEFAULT_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
DEFAULT_MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The limits of this worker, defaults filled in."""

    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


def resolve_sizes(settings: WorkerSettings, spec: ModelSpec, device: torch.device) -> Sizes:
    longest = spec.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > longest:
        raise ModelConfigError(
            f"max_model_len {settings.max_model_len} is above the model's max_position_embeddings {longest}: "
            f"set --max-model-len {longest} or less"
        )
    return Sizes(
        block_size=settings.block_size or DEFAULT_BLOCK_SIZE[device.type],
        max_model_len=settings.max_model_len or longest,
        max_num_seqs=settings.max_num_seqs or DEFAULT_MAX_NUM_SEQS[device.type],
        max_num_batched_tokens=settings.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS[device.type],
    )


def without_idle_indexer(spec: ModelSpec, sizes: Sizes) -> ModelSpec:
    """Where no sequence is longer than what an indexer chooses, it chooses everything: attention needs none."""
    if spec.indexer is None or sizes.max_model_len > spec.indexer.num_chosen:
        return spec
    return replace(spec, indexer=None, layers=tuple(replace(layer, has_indexer=False) for layer in spec.layers))


def resolve_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """`kv_cache_dtype` as a dtype; `auto` is the model's, `fp8` is float8_e4m3fn."""
    if name == "auto":
        return dtype
    return torch.float8_e4m3fn if name == "fp8" else getattr(torch, name)


def batch_limits(facts: WorkerFacts) -> BatchLimits:
    return BatchLimits(
        max_num_seqs=facts.max_num_seqs,
        max_model_len=facts.max_model_len,
        block_size=facts.block_size,
        num_blocks=facts.num_blocks,
        first_block_id=facts.first_block_id,
        vocab_size=facts.vocab_size,
        max_num_logprobs=facts.max_num_logprobs,
        pooling=facts.pooling,
        can_prompt_logprobs=facts.can_prompt_logprobs,
        keeps_row_states=facts.keeps_row_states,
    )


def load_model(
    settings: WorkerSettings, family: type[ModelFamily], spec: ModelSpec, build: BuildContext, max_position: int
) -> ModelFamily:
    begun = time.monotonic()
    if settings.load_format == "auto" and settings.model is not None:
        spec = spec_as_stored(spec, family, settings.model)
        # Whatever is wrong with the files shows on a model without memory, before the device holds anything.
        check_weights(family(spec, max_position, replace(build, device=torch.device("meta"))), settings.model)
    model = family(spec, max_position, build)
    if settings.load_format == "dummy":
        fill_random(model, settings.model, settings.seed)
    elif settings.model is not None:
        load_weights(model, settings.model)
    log.info(
        "weights are in place",
        model=str(settings.model),
        architecture=spec.architecture,
        dtype=dtype_name(build.dtype),
        load_format=settings.load_format,
        seconds=round(time.monotonic() - begun, 2),
    )
    return model


def plan_memory(
    settings: WorkerSettings,
    spec: ModelSpec,
    parallel: ParallelContext,
    shape: KVCacheShape,
    sizes: Sizes,
    weight_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
    workspace_bytes: int = 0,
    num_local_ranks: int = 1,
    num_state_rows: int = 0,
) -> tuple[Sizes, MemoryPlan]:
    """The KV pool; a max_model_len that nobody asked for is lowered to what the pool holds.

    `workspace_bytes`: what the runner holds beside weights, activations and KV cache. `num_local_ranks`: how many
    share this node, and on a CPU its memory. `num_state_rows`: rows that layers keep a state of, where they keep one.
    """
    cpu_kv_cache_gib = settings.cpu_kv_cache_gib / num_local_ranks
    activations = activation_bytes(spec, parallel, sizes.max_num_batched_tokens, sizes.max_num_seqs, dtype)
    activations += workspace_bytes
    states = StateShape.of(spec, parallel, dtype)
    state_row_bytes = 0 if states is None else states.row_bytes
    total_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    if settings.max_model_len is None:
        budget = int(cpu_kv_cache_gib * (1 << 30))
        if device.type == "cuda":
            budget = int(total_bytes * settings.gpu_memory_utilization) - weight_bytes - activations
            budget -= state_row_bytes * num_state_rows
        fitting = longest_sequence(shape, budget)
        if 0 < fitting < sizes.max_model_len:
            log.warning("max_model_len is lowered to what the KV cache holds", model=sizes.max_model_len, now=fitting)
            sizes = Sizes(sizes.block_size, fitting, sizes.max_num_seqs, sizes.max_num_batched_tokens)
    if device.type == "cuda":
        plan = plan_cuda_memory(
            shape,
            total_bytes=total_bytes,
            utilization=settings.gpu_memory_utilization,
            weight_bytes=weight_bytes,
            activation_bytes=activations,
            max_model_len=sizes.max_model_len,
            max_num_seqs=sizes.max_num_seqs,
            device=str(device),
            state_row_bytes=state_row_bytes,
            num_state_rows=num_state_rows,
        )
    else:
        plan = plan_cpu_memory(
            shape,
            kv_cache_gib=cpu_kv_cache_gib,
            weight_bytes=weight_bytes,
            activation_bytes=activations,
            max_model_len=sizes.max_model_len,
            max_num_seqs=sizes.max_num_seqs,
            available_bytes=available_host_bytes(),
            state_row_bytes=state_row_bytes,
            num_state_rows=num_state_rows,
        )
    return sizes, plan


def agree_on_sizes(sizes: Sizes, plan: MemoryPlan, shape: KVCacheShape, group: RankGroup) -> tuple[Sizes, MemoryPlan]:
    """What the rank with the least room can hold, on all ranks."""
    num_blocks, max_model_len = group.least([plan.num_blocks, sizes.max_model_len])
    return (
        replace(sizes, max_model_len=max_model_len),
        replace(plan, num_blocks=num_blocks, kv_bytes=num_blocks * shape.block_bytes),
    )


def attention_spec(spec: ModelSpec, parallel: ParallelContext, max_model_len: int | None = None) -> AttentionSpec:
    """This rank's. Chunks that no sequence of `max_model_len` tokens leaves are none."""
    heads = parallel.heads(spec.num_heads, spec.num_kv_heads)
    held = parallel.layers(spec.num_layers)
    layers = [spec.layers[layer] for layer in caching_layers(spec, parallel)]
    chunks = tuple(layer.attention_chunk for layer in layers)
    if max_model_len is not None:
        chunks = tuple(None if chunk is None or max_model_len <= chunk else chunk for chunk in chunks)
    return AttentionSpec(
        num_heads=heads.query.size,
        num_kv_heads=heads.kv.size,
        head_dim=spec.head_dim,
        scale=spec.attention_scale,
        windows=tuple(layer.sliding_window for layer in layers),
        softcap=spec.attention_softcap,
        has_sinks=spec.attention_sinks,
        value_dim=None if spec.latent is None else spec.latent.kv_rank,
        chunks=chunks,
        num_chosen=None if spec.indexer is None else spec.indexer.num_chosen,
        kv_heads=differing_heads(spec, parallel),
        remakes_values=spec.value_norm or any(layer.keys_are_values for layer in layers),
        shares_kv=any(spec.layers[layer].kv_source is not None for layer in held),
    )


def held_kv_scales(
    spec: ModelSpec, scales: Sequence[KVScales] | None, parallel: ParallelContext
) -> list[KVScales] | None:
    """Of the checkpoint's scales of all layers those of the ones that this rank caches; None: it has none."""
    return None if scales is None else [scales[layer] for layer in caching_layers(spec, parallel)]


def worker_facts(
    model: Path,
    spec: ModelSpec,
    sizes: Sizes,
    plan: MemoryPlan,
    shape: KVCacheShape,
    device: torch.device,
    dtype: torch.dtype,
    pooling: PoolingSpec | None = None,
) -> WorkerFacts:
    return WorkerFacts(
        model=model.name or str(model),
        architecture=spec.architecture,
        dtype=dtype_name(dtype),
        kv_cache_dtype=dtype_name(shape.dtype),
        devices=(device_label(device),),
        num_blocks=plan.num_blocks,
        first_block_id=FIRST_BLOCK_ID,
        block_size=sizes.block_size,
        max_model_len=sizes.max_model_len,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        buckets=(),
        vocab_size=spec.vocab_size,
        max_num_logprobs=MAX_NUM_LOGPROBS,
        block_bytes=shape.block_bytes,
        can_mask_tokens=pooling is None,
        can_prompt_logprobs=pooling is None,
        pooling=None if pooling is None else pooling_facts(pooling),
        weights_per_token=sum(spec.layer_weights()),
        keeps_row_states=spec.row_state_bytes > 0 or spec.row_cache_dim > 0 or spec.gated_delta is not None,
    )


def pooling_facts(pooling: PoolingSpec) -> PoolingFacts:
    kind = PoolingKind.SCORE if pooling.kind == "score" else PoolingKind.EMBEDDING
    return PoolingFacts(kind, pooling.dimensions, pooling.whole_prompts, only=True)


def encoder_sizes(sizes: Sizes, settings: WorkerSettings) -> Sizes:
    """Every prompt of an encoder runs in one step: the two limits go together."""
    if settings.max_num_batched_tokens is None:
        return replace(sizes, max_num_batched_tokens=max(sizes.max_num_batched_tokens, sizes.max_model_len))
    return replace(sizes, max_model_len=min(sizes.max_model_len, sizes.max_num_batched_tokens))


def plan_encoder_memory(shape: KVCacheShape, sizes: Sizes, weight_bytes: int, device: torch.device) -> MemoryPlan:
    """No KV cache. Blocks of nothing are announced all the same, as many as all rows may need, so that an encoder is
    scheduled like everything else."""
    num_blocks = FIRST_BLOCK_ID + sizes.max_num_seqs * shape.blocks_for(sizes.max_model_len)
    return MemoryPlan(str(device), None, weight_bytes, 0, 0, num_blocks, sizes.block_size)

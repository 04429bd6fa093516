"""The torch runner: a step batch in, sampled tokens out, everything computed inside `execute`.

Runs on a CPU; on a CUDA device it is the plain reference, with the host in the loop of every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
import torch

from gpu_worker.attention.api import AttentionSpec
from gpu_worker.attention.torch_backend import TorchAttention
from gpu_worker.config import WorkerSettings
from gpu_worker.device import available_host_bytes, device_label, dtype_name, resolve_device, resolve_dtype
from gpu_worker.input_batch import BatchLimits, InputBatch, StepInputs
from gpu_worker.kv_cache import (
    FIRST_BLOCK_ID,
    KVCache,
    KVCacheShape,
    MemoryPlan,
    activation_bytes,
    longest_sequence,
    plan_cpu_memory,
    plan_cuda_memory,
)
from gpu_worker.layers.linear import BuildContext
from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.loader import fill_random, load_weights, read_spec
from gpu_worker.parallel import ParallelContext
from gpu_worker.quant.none import Unquantized
from gpu_worker.runner_api import RowFault, RowFaultCode, StepBatch, StepResult, TokenMask, UInt32Array, WorkerFacts
from gpu_worker.sampler import SampledTokens, sample

log = structlog.get_logger(__name__)

MAX_NUM_LOGPROBS = 20
DEFAULT_BLOCK_SIZE = 16
DEFAULT_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
DEFAULT_MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The limits of this worker, defaults filled in."""

    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(slots=True)
class FinishedStep:
    """A step that was computed in `execute` already."""

    finished: StepResult

    def result(self) -> StepResult:
        return self.finished


class TorchRunner:
    """Implements `runner_api.Runner`."""

    def __init__(
        self,
        model: ModelFamily,
        kv_cache: KVCache,
        attention: TorchAttention,
        facts: WorkerFacts,
        device: torch.device,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._attention = attention
        self._facts = facts
        self._device = device
        self._limits = BatchLimits(
            max_num_seqs=facts.max_num_seqs,
            max_model_len=facts.max_model_len,
            block_size=facts.block_size,
            num_blocks=facts.num_blocks,
            first_block_id=facts.first_block_id,
            vocab_size=facts.vocab_size,
            max_num_logprobs=facts.max_num_logprobs,
        )
        self._rows = InputBatch(self._limits)

    @classmethod
    def load(cls, settings: WorkerSettings) -> TorchRunner:
        """Build the model that `settings` name, load its weights and allocate the KV cache.

        Raises:
            ModelConfigError: config.json is missing, not supported, or the settings exceed the model.
            CheckpointError: the weights are damaged or not those of the config.
            DeviceError: the device is not there.
            MemoryBudgetError: the KV cache does not fit; names the setting to change.
        """
        if settings.model is None:
            raise ModelConfigError("no model is set: give the model's directory with --model")
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        device = resolve_device(settings.device)
        spec, family = read_spec(settings.model)
        dtype = resolve_dtype(settings.dtype, device, spec.dtype)
        kv_dtype = dtype if settings.kv_cache_dtype == "auto" else getattr(torch, settings.kv_cache_dtype)
        parallel = ParallelContext()
        build = BuildContext(parallel, Unquantized(), dtype, device)
        sizes = _resolve_sizes(settings, spec, device)
        shape = KVCacheShape.of(spec, parallel, sizes.block_size, kv_dtype)
        model = _load_model(settings, family, spec, build, sizes.max_model_len)
        weight_bytes = model.num_bytes()
        sizes, plan = _plan_memory(settings, spec, parallel, shape, sizes, weight_bytes, device, dtype)
        for line in plan.lines():
            log.info(line)
        kv_cache = KVCache(shape, plan.num_blocks, device)
        attention = TorchAttention(_attention_spec(spec, parallel), kv_cache.layers, dtype)
        facts = _facts(settings.model, spec, sizes, plan, shape, device, dtype)
        return cls(model, kv_cache, attention, facts, device)

    def describe(self) -> WorkerFacts:
        return self._facts

    def reset(self) -> None:
        self._rows.clear()

    def close(self) -> None:
        """Nothing is held that the end of the process does not free."""
        self._rows.clear()

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> FinishedStep:
        begun = time.perf_counter_ns()
        inputs, faults = self._rows.apply(batch)
        built = time.perf_counter_ns()
        logits = None
        if inputs is not None:
            logits = self._forward(inputs)
        computed = time.perf_counter_ns()
        mask = wait_for_mask() if len(batch.mask_rows) else None
        masked = time.perf_counter_ns()
        result = StepResult(
            step_id=batch.step_id,
            rows=np.zeros(0, dtype=np.uint32),
            offsets=np.zeros(1, dtype=np.uint32),
            token_ids=np.zeros(0, dtype=np.uint32),
            faults=faults,
        )
        if inputs is not None and logits is not None:
            self._sample(inputs, logits, mask, result)
        result.input_ns = built - begun
        result.forward_ns = computed - built
        result.sample_ns = time.perf_counter_ns() - masked
        return FinishedStep(result)

    @torch.inference_mode()
    def _forward(self, inputs: StepInputs) -> torch.Tensor | None:
        """Logits of the runs that sample: [num_sampled, vocab_size]; None where none does."""
        self._attention.plan(inputs.metadata)
        token_ids = torch.from_numpy(inputs.token_ids).to(self._device)
        positions = torch.from_numpy(inputs.metadata.positions).to(self._device)
        hidden = self._model.hidden_states(token_ids, positions, self._attention)  # [num_tokens, hidden]
        num_sampled = len(inputs.sampled_tokens)
        if num_sampled == 0:
            return None
        if num_sampled != len(inputs.token_ids) or (np.diff(inputs.sampled_tokens) != 1).any():
            hidden = hidden.index_select(0, torch.from_numpy(inputs.sampled_tokens).to(self._device))
        return self._model.logits(hidden)

    def _sample(self, inputs: StepInputs, logits: torch.Tensor, mask: TokenMask | None, result: StepResult) -> None:
        rows = inputs.sampled_rows.tolist()
        bitmasks = None if mask is None else _bitmasks_of(rows, mask)
        samplers = [self._rows.sampler(row) for row in rows]
        sampled = sample(logits, samplers, inputs.sampled_positions, bitmasks)
        failed = {fault.index for fault in sampled.faults}
        for fault in sampled.faults:
            row = rows[fault.index]
            result.faults.append(RowFault(row, fault.code, f"row {row}: {fault.message}"))
            blocks = self._rows.forget(row)
            if fault.code == RowFaultCode.NOT_FINITE:
                self._kv_cache.scrub(blocks)
        for index, row in enumerate(rows):
            if index not in failed:
                self._rows.append(row, int(sampled.token_ids[index]))
        _write_tokens(result, inputs, sampled, failed)


def _write_tokens(result: StepResult, inputs: StepInputs, sampled: SampledTokens, failed: set[int]) -> None:
    keep = np.array([index for index in range(len(inputs.sampled_rows)) if index not in failed], dtype=np.int64)
    result.rows = inputs.sampled_rows[keep].astype(np.uint32)
    result.offsets = np.arange(len(keep) + 1, dtype=np.uint32)
    result.token_ids = sampled.token_ids[keep].astype(np.uint32)
    if sampled.logprobs is not None and sampled.top_token_ids is not None and sampled.top_logprobs is not None:
        result.logprobs = sampled.logprobs[keep]
        result.top_token_ids = sampled.top_token_ids[keep]
        result.top_logprobs = sampled.top_logprobs[keep]


def _bitmasks_of(rows: list[int], mask: TokenMask) -> list[UInt32Array | None]:
    by_row = {int(row): mask.bitmask[index] for index, row in enumerate(mask.rows)}
    return [by_row.get(row) for row in rows]


def _resolve_sizes(settings: WorkerSettings, spec: ModelSpec, device: torch.device) -> _Sizes:
    longest = spec.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > longest:
        raise ModelConfigError(
            f"max_model_len {settings.max_model_len} is above the model's max_position_embeddings {longest}: "
            f"set --max-model-len {longest} or less"
        )
    return _Sizes(
        block_size=settings.block_size or DEFAULT_BLOCK_SIZE,
        max_model_len=settings.max_model_len or longest,
        max_num_seqs=settings.max_num_seqs or DEFAULT_MAX_NUM_SEQS[device.type],
        max_num_batched_tokens=settings.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS[device.type],
    )


def _load_model(
    settings: WorkerSettings, family: type[ModelFamily], spec: ModelSpec, build: BuildContext, max_position: int
) -> ModelFamily:
    model = family(spec, max_position, build)
    begun = time.monotonic()
    if settings.load_format == "dummy":
        fill_random(model, settings.seed)
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


def _plan_memory(
    settings: WorkerSettings,
    spec: ModelSpec,
    parallel: ParallelContext,
    shape: KVCacheShape,
    sizes: _Sizes,
    weight_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[_Sizes, MemoryPlan]:
    """The KV pool; a max_model_len that nobody asked for is lowered to what the pool holds."""
    activations = activation_bytes(spec, parallel, sizes.max_num_batched_tokens, sizes.max_num_seqs, dtype)
    total_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    if settings.max_model_len is None:
        budget = int(settings.cpu_kv_cache_gib * (1 << 30))
        if device.type == "cuda":
            budget = int(total_bytes * settings.gpu_memory_utilization) - weight_bytes - activations
        fitting = longest_sequence(shape, budget)
        if 0 < fitting < sizes.max_model_len:
            log.warning("max_model_len is lowered to what the KV cache holds", model=sizes.max_model_len, now=fitting)
            sizes = _Sizes(sizes.block_size, fitting, sizes.max_num_seqs, sizes.max_num_batched_tokens)
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
        )
    else:
        plan = plan_cpu_memory(
            shape,
            kv_cache_gib=settings.cpu_kv_cache_gib,
            weight_bytes=weight_bytes,
            activation_bytes=activations,
            max_model_len=sizes.max_model_len,
            max_num_seqs=sizes.max_num_seqs,
            available_bytes=available_host_bytes(),
        )
    return sizes, plan


def _attention_spec(spec: ModelSpec, parallel: ParallelContext) -> AttentionSpec:
    heads = parallel.heads(spec.num_heads, spec.num_kv_heads)
    return AttentionSpec(
        num_heads=heads.query.size,
        num_kv_heads=heads.kv.size,
        head_dim=spec.head_dim,
        scale=spec.attention_scale,
        windows=tuple(layer.sliding_window for layer in spec.layers),
        softcap=spec.attention_softcap,
    )


def _facts(
    model: Path,
    spec: ModelSpec,
    sizes: _Sizes,
    plan: MemoryPlan,
    shape: KVCacheShape,
    device: torch.device,
    dtype: torch.dtype,
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
        can_mask_tokens=True,
    )

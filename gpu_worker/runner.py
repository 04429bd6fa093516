"""The torch runner: a step batch in, sampled tokens out, everything computed inside `execute`.

Runs on a CPU; on a CUDA device it is the plain reference, with the host in the loop of every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from gpu_worker.assembly import (
    attention_spec,
    batch_limits,
    load_model,
    plan_memory,
    resolve_kv_dtype,
    resolve_sizes,
    worker_facts,
)
from gpu_worker.attention.torch_backend import TorchAttention
from gpu_worker.config import WorkerSettings
from gpu_worker.device import resolve_device, resolve_dtype
from gpu_worker.input_batch import InputBatch, StepInputs
from gpu_worker.invariant.coverage import CoveredScheme, refuse_uncovered
from gpu_worker.invariant.logits import TiledLogits
from gpu_worker.invariant.row_tiles import TiledScheme
from gpu_worker.invariant.torch_attention import TiledTorchAttention
from gpu_worker.invariant.torch_ops import PiecewiseOps
from gpu_worker.kv_cache import KVCache, KVCacheShape
from gpu_worker.layers.decoder import HiddenStates
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.ops import TORCH_OPS
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel import ParallelContext
from gpu_worker.quant.api import QuantScheme
from gpu_worker.quant.scheme import make_scheme
from gpu_worker.runner_api import RowFault, RowFaultCode, StepBatch, StepResult, TokenMask, UInt32Array, WorkerFacts
from gpu_worker.sampler import SampledTokens, sample

log = structlog.get_logger(__name__)


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
        logits: Callable[[HiddenStates], torch.Tensor] | None = None,
    ) -> None:
        self.model = model
        self._logits = logits
        self._kv_cache = kv_cache
        self.attention = attention
        self._facts = facts
        self._device = device
        self._rows = InputBatch(batch_limits(facts))

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
        if settings.num_threads is not None or settings.deterministic:
            # Once it is set, MKL no longer picks a number of threads for each product.
            torch.set_num_threads(settings.num_threads or torch.get_num_threads())
        device = resolve_device(settings.device)
        spec, family = read_spec(settings.model)
        dtype = resolve_dtype(settings.dtype, device, spec.dtype)
        if settings.kv_cache_dtype == "fp8":
            raise ModelConfigError(
                "kv_cache_dtype fp8 needs the CUDA kernels, and this model runs in plain torch: "
                "set --kv-cache-dtype auto, bfloat16 or float16"
            )
        kv_dtype = resolve_kv_dtype(settings.kv_cache_dtype, dtype)
        parallel = ParallelContext()
        if settings.deterministic:
            refuse_uncovered(spec)
            _refuse_other_devices(device)
        ops = PiecewiseOps() if settings.deterministic else TORCH_OPS
        scheme: QuantScheme = make_scheme(
            settings.model,
            family.name_rules,
            setting=settings.quantization,
            has_weights=settings.load_format == "auto",
        )
        if settings.deterministic:
            scheme = TiledScheme(CoveredScheme(scheme))
        build = BuildContext(parallel, scheme, dtype, device, ops)
        sizes = resolve_sizes(settings, spec, device)
        shape = KVCacheShape.of(spec, parallel, sizes.block_size, kv_dtype)
        model = load_model(settings, family, spec, build, sizes.max_model_len)
        weight_bytes = model.num_bytes()
        sizes, plan = plan_memory(settings, spec, parallel, shape, sizes, weight_bytes, device, dtype)
        for line in plan.lines():
            log.info(line)
        kv_cache = KVCache(shape, plan.num_blocks, device)
        backend = TiledTorchAttention if settings.deterministic else TorchAttention
        attention = backend(attention_spec(spec, parallel), kv_cache.layers, dtype)
        facts = worker_facts(settings.model, spec, sizes, plan, shape, device, dtype)
        return cls(model, kv_cache, attention, facts, device, TiledLogits(model) if settings.deterministic else None)

    def describe(self) -> WorkerFacts:
        return self._facts

    def reset(self) -> None:
        self._rows.clear()

    def close(self) -> None:
        """Nothing is held that the end of the process does not free."""
        self._rows.clear()

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> FinishedStep:
        begun = time.perf_counter_ns()
        inputs, faults = self.build_inputs(batch)
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
            self.draw(inputs, logits, mask, result)
        result.input_ns = built - begun
        result.forward_ns = computed - built
        result.sample_ns = time.perf_counter_ns() - masked
        return FinishedStep(result)

    def build_inputs(self, batch: StepBatch) -> tuple[StepInputs | None, list[RowFault]]:
        """What the forward pass reads, and the rows that are not as the step says."""
        return self._rows.apply(batch)

    @torch.inference_mode()
    def _forward(self, inputs: StepInputs) -> torch.Tensor | None:
        """Logits of the runs that sample: [num_sampled, vocab_size]; None where none does."""
        self.attention.plan(inputs.metadata)
        token_ids = torch.from_numpy(inputs.token_ids).to(self._device)
        positions = torch.from_numpy(inputs.metadata.positions).to(self._device)
        hidden = self.model.hidden_states(token_ids, positions, self.attention)  # [num_tokens, hidden]
        num_sampled = len(inputs.sampled_tokens)
        if num_sampled == 0:
            return None
        if num_sampled != len(inputs.token_ids) or (np.diff(inputs.sampled_tokens) != 1).any():
            hidden = hidden.select(torch.from_numpy(inputs.sampled_tokens).to(self._device))
        return self.model.logits(hidden) if self._logits is None else self._logits(hidden)

    def draw(self, inputs: StepInputs, logits: torch.Tensor, mask: TokenMask | None, result: StepResult) -> None:
        """Sample into `result`, and into the rows. logits [num_sampled, vocab_size]."""
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


def _refuse_other_devices(device: torch.device) -> None:
    if device.type != "cpu":
        raise ModelConfigError(
            f"--deterministic needs the kernels on {device}, and this model or device runs in plain torch there: "
            "leave it out, or set --device cpu"
        )


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

"""The torch runner: a step batch in, sampled tokens out, everything computed inside `execute`.

Runs on a CPU; on a CUDA device it is the plain reference, with the host in the loop of every step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import structlog
import torch

from gpu_worker.assembly import (
    agree_on_sizes,
    attention_spec,
    batch_limits,
    encoder_sizes,
    load_model,
    plan_encoder_memory,
    plan_memory,
    resolve_kv_dtype,
    resolve_sizes,
    without_idle_indexer,
    worker_facts,
)
from gpu_worker.attention.api import ModelAttention, for_each_kind
from gpu_worker.attention.encoder_backend import EncoderAttention
from gpu_worker.attention.indexed_backend import choice_bytes, torch_attention
from gpu_worker.config import WorkerSettings
from gpu_worker.cpu.attention import CpuAttention
from gpu_worker.cpu.choice import choose_team
from gpu_worker.cpu.ops import CpuOps
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
from gpu_worker.layers.ops import TORCH_OPS, LayerOps
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.family import ModelFamily, ReadsPairs
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.process_group import RankGroup, single_rank
from gpu_worker.parallel.sampled import UntakenStep, from_words, in_order_of_rows, num_words, to_words
from gpu_worker.pooling import Pooler, PoolingSpec, read_pooling
from gpu_worker.prompt_logprobs import describe_run, num_rows_at_a_time
from gpu_worker.quant.api import QuantScheme
from gpu_worker.quant.scheme import make_scheme
from gpu_worker.runner_api import (
    Float32Array,
    PromptLogprobs,
    RowFault,
    RowFaultCode,
    StepBatch,
    StepResult,
    TokenMask,
    UInt32Array,
    WorkerFacts,
)
from gpu_worker.sampler import SampledTokens, sample

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class FinishedStep:
    """A step that was computed in `execute` already."""

    finished: StepResult
    describes_prompts: bool = False

    def result(self) -> StepResult:
        return self.finished


@dataclass(slots=True)
class AwaitedStep:
    """A step whose tokens another rank draws."""

    begun: StepResult
    untaken: UntakenStep

    def result(self) -> StepResult:
        _write_tokens(self.begun, self.untaken.inputs, self.untaken.sampled())
        return self.begun


@dataclass(frozen=True, slots=True)
class PooledVectors:
    """What a step's pooling gave: a vector a row."""

    rows: list[int] = field(default_factory=list)
    values: Float32Array = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))


class TorchRunner:
    """Implements `runner_api.Runner`."""

    def __init__(
        self,
        model: ModelFamily,
        kv_cache: KVCache,
        attention: ModelAttention,
        facts: WorkerFacts,
        device: torch.device,
        group: RankGroup,
        pooling: PoolingSpec | None = None,
        logits: Callable[[HiddenStates], torch.Tensor] | None = None,
    ) -> None:
        self._group = group
        self._stage = group.context()
        self._num_executed = 0
        self._untaken: deque[UntakenStep] = deque()
        self.model = model
        self._pooler = None if pooling is None else Pooler(pooling, model)
        self._to_logits = model.logits if logits is None else logits
        # Of the rows that this rank draws for; `logits` is for a group of one, whose are all of them.
        self._to_own_logits = partial(model.logits, deals=True) if logits is None else logits
        self._kv_cache = kv_cache
        self.attention = attention
        self._facts = facts
        self._device = device
        self._rows = InputBatch(batch_limits(facts))

    @classmethod
    def load(cls, settings: WorkerSettings, group: RankGroup | None = None) -> TorchRunner:
        """Build this rank's part of the model that `settings` name, load its weights and allocate the KV cache.

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
        elif group is not None and group.place.num_local_ranks > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // group.place.num_local_ranks))
        device = resolve_device(settings.device, 0 if group is None else group.place.local_rank)
        spec, family = read_spec(settings.model)
        pooling = read_pooling(settings.model, spec, family, settings.task, settings.pooling)
        if pooling is not None:
            spec = replace(spec, has_output_head=False)
        sizes = resolve_sizes(settings, spec, device)
        spec = without_idle_indexer(spec, sizes)
        dtype = resolve_dtype(settings.dtype, device, spec.dtype)
        spec = family.in_dtype(spec, settings.model, dtype)
        if settings.kv_cache_dtype == "fp8":
            raise ModelConfigError(
                "kv_cache_dtype fp8 needs the CUDA kernels, and this model runs in plain torch: "
                "set --kv-cache-dtype auto, bfloat16 or float16"
            )
        if spec.row_cache_dim and settings.kv_cache_dtype != "auto":
            raise ModelConfigError(
                f"kv_cache_dtype {settings.kv_cache_dtype}: {spec.architecture} runs in transformers' own caches, "
                "which have the model's type: set --kv-cache-dtype auto"
            )
        kv_dtype = resolve_kv_dtype(settings.kv_cache_dtype, dtype)
        group = group or single_rank(spec.num_layers)
        parallel = group.context()
        if settings.deterministic:
            refuse_uncovered(spec, family)
            _refuse_other_devices(device)
        team = None
        if not (settings.deterministic or family.is_encoder or family.host_plans_attention):
            team = choose_team(settings.cpu_kernels, device, dtype, settings.kernel_cache_dir)
        has_chunks = any(layer.attention_chunk is not None for layer in spec.layers)
        attends_compiled = team is not None and spec.latent is None and kv_dtype == torch.bfloat16 and not has_chunks
        ops: LayerOps = PiecewiseOps() if settings.deterministic else TORCH_OPS
        if team is not None:
            ops = CpuOps(team, attends=attends_compiled)
        scheme: QuantScheme = make_scheme(
            settings.model,
            family.name_rules,
            setting=settings.quantization,
            has_weights=settings.load_format == "auto",
            ops=ops,
            canonical_name=family.canonical_name,
        )
        if settings.deterministic:
            scheme = TiledScheme(CoveredScheme(scheme))
        build = BuildContext(parallel, scheme, dtype, device, ops)
        shape = KVCacheShape.of(spec, parallel, sizes.block_size, kv_dtype)
        if family.is_encoder:
            sizes, shape = encoder_sizes(sizes, settings), replace(shape, num_layers=0)
        model = load_model(settings, family, spec, build, sizes.max_model_len)
        weight_bytes = model.num_bytes()
        num_local_ranks = group.place.num_local_ranks
        if family.is_encoder:
            plan = plan_encoder_memory(shape, sizes, weight_bytes, device)
        else:
            sizes, plan = plan_memory(
                settings,
                spec,
                parallel,
                shape,
                sizes,
                weight_bytes,
                device,
                dtype,
                workspace_bytes=spec.row_state_bytes * sizes.max_num_seqs
                + choice_bytes(spec.indexer, sizes.max_num_batched_tokens),
                num_local_ranks=num_local_ranks,
                num_state_rows=sizes.max_num_seqs,
            )
            sizes, plan = agree_on_sizes(sizes, plan, shape, group)
        for line in plan.lines()[: 1 if family.is_encoder else None]:
            log.info(line)
        kv_cache = KVCache(shape, plan.num_blocks, device)
        model.allocate_states(sizes.max_num_seqs)
        heads = attention_spec(spec, parallel, sizes.max_model_len)
        attention: ModelAttention
        if family.is_encoder:
            attention = EncoderAttention(heads)
        elif settings.deterministic:
            attention = TiledTorchAttention(heads, kv_cache.layers, dtype)
        elif team is not None and attends_compiled:
            caches, threads = kv_cache.layers, team
            attention = for_each_kind(
                heads, lambda kind, layers: CpuAttention(kind, [caches[layer] for layer in layers], dtype, threads)
            )
        else:
            attention = torch_attention(heads, kv_cache, dtype)
        facts = worker_facts(settings.model, spec, sizes, plan, shape, device, dtype, pooling)
        logits = TiledLogits(model) if settings.deterministic else None
        return cls(model, kv_cache, attention, facts, device, group, pooling, logits)

    def describe(self) -> WorkerFacts:
        return self._facts

    def reset(self) -> None:
        # What the last session's steps drew is still under way: it must not be taken for the next one's.
        self._take_until(len(self._untaken))
        self._rows.clear()
        if self._pooler is not None:
            self._pooler.clear()
        if self.model.row_states is not None:
            self.model.row_states.clear()

    def close(self) -> None:
        """Nothing is held that the end of the process does not free."""
        self._rows.clear()

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> FinishedStep | AwaitedStep:
        begun = time.perf_counter_ns()
        step, self._num_executed = self._num_executed, self._num_executed + 1
        self._take_what_is_needed(batch)
        if self.model.row_states is not None:
            self.model.row_states.drop(batch.drop_rows.tolist())
        inputs, faults = self.build_inputs(batch)
        built = time.perf_counter_ns()
        logits = None
        pooled = PooledVectors()
        prompts: list[PromptLogprobs] = []
        if inputs is not None:
            hidden = self._forward(inputs, step)
            if hidden is not None:
                pooled = self._pool(inputs, hidden)
                prompts = self._describe_prompts(inputs, hidden)
                logits = self._logits(inputs, hidden)
        computed = time.perf_counter_ns()
        mask = wait_for_mask() if len(batch.mask_rows) else None
        masked = time.perf_counter_ns()
        result = StepResult(
            step_id=batch.step_id,
            rows=np.zeros(0, dtype=np.uint32),
            offsets=np.zeros(1, dtype=np.uint32),
            token_ids=np.zeros(0, dtype=np.uint32),
            faults=faults,
            input_ns=built - begun,
            forward_ns=computed - built,
        )
        self._write_pooled(pooled, result)
        result.prompt_logprobs = prompts
        result.awaits_prompts = inputs is not None and bool(inputs.prompts) and not self._stage.is_last_stage
        if inputs is None or not len(inputs.sampled_rows):
            return FinishedStep(result, bool(prompts))
        if not self._group.samples:
            untaken = self._await_tokens(inputs, step)
            return AwaitedStep(result, untaken)
        if logits is not None:
            sampled = self.draw(inputs, logits, mask, step)
            self._take(inputs, sampled)
            _write_tokens(result, inputs, sampled)
            failed = {fault.row for fault in result.faults}
            result.prompt_logprobs = [part for part in prompts if part.row not in failed]
        result.sample_ns = time.perf_counter_ns() - masked
        return FinishedStep(result, bool(prompts))

    def build_inputs(self, batch: StepBatch) -> tuple[StepInputs | None, list[RowFault]]:
        """What the forward pass reads, and the rows that are not as the step says."""
        return self._rows.apply(batch)

    @torch.inference_mode()
    def _forward(self, inputs: StepInputs, step: int) -> HiddenStates | None:
        """What the last layer gives; None if another stage has it."""
        self.attention.plan(inputs.metadata)
        if self.model.row_states is not None:
            self.model.row_states.plan(inputs.metadata)
        if self.model.states is not None:
            self.model.states.plan(inputs.metadata)
        token_ids = torch.from_numpy(inputs.token_ids).to(self._device)
        positions = torch.from_numpy(inputs.metadata.positions).to(self._device)
        received = None
        if not self._stage.is_first_stage:
            size = (len(inputs.token_ids), self.model.spec.hidden_size)
            on_host = self._group.receive_hidden(torch.empty(size, dtype=self.model.dtype), step)
            received = on_host.to(self._device)  # [num_tokens, hidden]
        if inputs.segments is not None and isinstance(self.model, ReadsPairs):
            segments = torch.from_numpy(inputs.segments).to(self._device)
            return self.model.hidden_states(token_ids, positions, self.attention, segments)
        hidden = self.model.hidden_states(token_ids, positions, self.attention, received)  # [num_tokens, hidden]
        if self._stage.is_last_stage:
            return hidden
        self._group.send_hidden(hidden.added().cpu(), step)
        return None

    @torch.inference_mode()
    def _pool(self, inputs: StepInputs, hidden: HiddenStates) -> PooledVectors:
        """Vectors of the rows that pool and have run their last token; the others' states are kept."""
        if self._pooler is None or not inputs.pooled:
            return PooledVectors()
        rows, vectors = self._pooler.pool(inputs.pooled, hidden)
        return PooledVectors() if vectors is None else PooledVectors(rows, vectors.cpu().numpy())

    def _write_pooled(self, pooled: PooledVectors, result: StepResult) -> None:
        if not pooled.rows:
            return
        rows = np.array(pooled.rows, dtype=np.uint32)
        finite = np.asarray(np.isfinite(pooled.values).all(axis=1))  # [num_pooled]
        for row in rows[~finite].tolist():
            message = f"row {row}: its vector is not finite"
            result.faults.append(RowFault(row, RowFaultCode.NOT_FINITE, message))
            self._kv_cache.scrub(self._rows.forget(row))
        if finite.any():
            result.pooled_rows = rows[finite]
            result.pooled_values = pooled.values[finite]

    @torch.inference_mode()
    def _describe_prompts(self, inputs: StepInputs, hidden: HiddenStates) -> list[PromptLogprobs]:
        """Every rank of a stage takes part: each has a share of the logits."""
        max_rows = num_rows_at_a_time(self._facts.vocab_size)
        return [describe_run(run, hidden, self._to_logits, max_rows).result() for run in inputs.prompts]

    @torch.inference_mode()
    def _logits(self, inputs: StepInputs, hidden: HiddenStates) -> torch.Tensor | None:
        """Of the runs that this rank draws for: [num_own, vocab_size]; None where none samples."""
        num_sampled = len(inputs.sampled_tokens)
        if num_sampled == 0:
            return None
        if num_sampled != len(inputs.token_ids) or (np.diff(inputs.sampled_tokens) != 1).any():
            hidden = hidden.select(torch.from_numpy(inputs.sampled_tokens).to(self._device))
        return self._to_own_logits(hidden)

    def draw(self, inputs: StepInputs, logits: torch.Tensor, mask: TokenMask | None, step: int) -> SampledTokens:
        """A token for every run that samples.

        logits: [num_own, vocab_size]; the ranks of the last stage each draw for some runs and tell each other, and the
        other stages.
        """
        rows = inputs.sampled_rows.tolist()
        own = self._stage.own_rows(len(rows))
        bitmasks = None if mask is None else _bitmasks_of(rows[own], mask)
        samplers = [self._rows.sampler(row) for row in rows]
        sampled = sample(logits, samplers[own], inputs.sampled_positions[own], bitmasks)
        if self._group.layout.world_size == 1:
            return sampled
        num_rows, width = num_words(samplers)
        words = to_words(sampled, (self._stage.rows_each(num_rows), width))
        if self._stage.size > 1:
            words = in_order_of_rows(self._stage.all_gather(words), self._stage.size, num_rows)
            sampled = from_words(words)
        self._group.send_tokens(words, step)
        return sampled

    def _await_tokens(self, inputs: StepInputs, step: int) -> UntakenStep:
        rows = inputs.sampled_rows.tolist()
        buffer = torch.empty(num_words([self._rows.sampler(row) for row in rows]), dtype=torch.int32)
        blocks = np.concatenate([self._rows.blocks(row) for row in rows])
        untaken = UntakenStep(inputs, self._group.expect_tokens(buffer, step), blocks)
        self._untaken.append(untaken)
        return untaken

    def _take_what_is_needed(self, batch: StepBatch) -> None:
        touched = [step.is_touched_by(batch, self._facts.block_size) for step in self._untaken]
        self._take_until(len(touched) - touched[::-1].index(True) if any(touched) else 0)

    def _take_until(self, num_steps: int) -> None:
        for _ in range(num_steps):
            step = self._untaken.popleft()
            self._take(step.inputs, step.sampled())

    def _take(self, inputs: StepInputs, sampled: SampledTokens) -> None:
        """Tokens join their rows; a row that got none is forgotten."""
        rows = inputs.sampled_rows.tolist()
        failed = {fault.index: fault for fault in sampled.faults}
        for index, row in enumerate(rows):
            if index not in failed:
                self._rows.append(row, int(sampled.token_ids[index]))
                continue
            blocks = self._rows.forget(row)
            if failed[index].code == RowFaultCode.NOT_FINITE:
                self._kv_cache.scrub(blocks)


def _refuse_other_devices(device: torch.device) -> None:
    if device.type != "cpu":
        raise ModelConfigError(
            f"--deterministic needs the kernels on {device}, and this model or device runs in plain torch there: "
            "leave it out, or set --device cpu"
        )


def _write_tokens(result: StepResult, inputs: StepInputs, sampled: SampledTokens) -> None:
    failed = {fault.index for fault in sampled.faults}
    for fault in sampled.faults:
        row = int(inputs.sampled_rows[fault.index])
        result.faults.append(RowFault(row, fault.code, f"row {row}: {fault.message}"))
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

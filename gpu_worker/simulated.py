"""A runner without a device or a model: made-up tokens at a configurable speed, and an oracle that checks every step.

Tokens are a documented function of (seed, sequence_index, position), see `simulated_tokens`. Time is that of a device
with a queue of its own: `execute` returns at once, and a step ends `step_ms + token_us * tokens + row_us * rows` after
the one before it has ended. What the oracle (`simulated_oracle`) finds is answered as row faults; with `strict` it
fails the process.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from gpu_worker import simulated_tokens
from gpu_worker.config import WorkerSettings
from gpu_worker.runner_api import (
    PromptLogprobs,
    RowFault,
    RowFaultCode,
    RowSampling,
    SessionEnded,
    StepBatch,
    StepError,
    StepResult,
    TokenMask,
    UInt32Array,
    WorkerFacts,
)
from gpu_worker.simulated_oracle import CheckedStep, IntArray, Oracle, UInt64Array
from gpu_worker.step_checks import check_step

logger = structlog.get_logger(__name__)

FIRST_BLOCK_ID = 1
MAX_NUM_LOGPROBS = 20
_PR_SET_TIMERSLACK = 29


class SimulatedFailure(Exception):
    """The failure of a whole worker: a planted one, or a broken contract in strict mode."""


@dataclass(frozen=True, slots=True)
class SimulationSpec:
    """What is simulated. Steps of planted failures are counted over the life of the runner, from 1."""

    model: str = "simulated"
    num_blocks: int = 4096
    block_size: int = 16
    max_num_seqs: int = 256
    max_model_len: int = 8192
    max_num_batched_tokens: int = 2048
    buckets: tuple[int, ...] = ()
    vocab_size: int = 32000
    eos_token_id: int | None = None
    eos_probability: float = 0.0
    step_ms: float = 0.0
    token_us: float = 0.0
    row_us: float = 0.0
    strict: bool = False
    crash_at_step: int | None = None
    hang_at_step: int | None = None
    drop_stream_at_step: int | None = None
    delay_at_step: int | None = None
    delay_s: float = 0.0
    out_of_order_at_step: int | None = None
    fault_row_token: int | None = None
    poison_token: int | None = None

    def __post_init__(self) -> None:
        if self.eos_token_id is not None and self.eos_token_id >= self.vocab_size:
            raise ValueError(
                f"sim_eos_token_id is {self.eos_token_id}: it must be below sim_vocab_size {self.vocab_size}"
            )
        if self.buckets and self.buckets[-1] < self.max_num_batched_tokens:
            raise ValueError(
                f"sim_buckets end at {self.buckets[-1]}, so steps of sim_max_num_batched_tokens"
                f" {self.max_num_batched_tokens} fit none: add a larger bucket or lower sim_max_num_batched_tokens"
            )

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> SimulationSpec:
        """Settings as given; what the vocabulary needs comes from the model directory where there is one.

        Raises ValueError and OSError with a message for the person who started the process.
        """
        config = _read_model_config(settings.model) if settings.model is not None else {}
        eos_token_id = settings.sim_eos_token_id
        if eos_token_id is None:
            # Some models have several: the first is the one that ends a text.
            eos = config.get("eos_token_id")
            eos_token_id = eos[0] if isinstance(eos, list) and eos else eos if isinstance(eos, int) else None
        return cls(
            model=str(settings.model) if settings.model is not None else "simulated",
            num_blocks=settings.sim_num_blocks,
            block_size=settings.sim_block_size or settings.block_size or 16,
            max_num_seqs=settings.sim_max_num_seqs or settings.max_num_seqs or 256,
            max_model_len=settings.sim_max_model_len or settings.max_model_len or 8192,
            max_num_batched_tokens=settings.sim_max_num_batched_tokens or settings.max_num_batched_tokens or 2048,
            buckets=settings.sim_buckets,
            vocab_size=settings.sim_vocab_size or _read_count(config, "vocab_size", 32000),
            eos_token_id=eos_token_id,
            eos_probability=settings.sim_eos_probability,
            step_ms=settings.sim_step_ms,
            token_us=settings.sim_token_us,
            row_us=settings.sim_row_us,
            strict=settings.sim_strict,
            crash_at_step=settings.sim_crash_at_step,
            hang_at_step=settings.sim_hang_at_step,
            drop_stream_at_step=settings.sim_drop_stream_at_step,
            delay_at_step=settings.sim_delay_at_step,
            delay_s=settings.sim_delay_s,
            out_of_order_at_step=settings.sim_out_of_order_at_step,
            fault_row_token=settings.sim_fault_row_token,
            poison_token=settings.sim_poison_token,
        )

    def facts(self) -> WorkerFacts:
        return WorkerFacts(
            model=self.model,
            architecture="Simulated",
            dtype="float32",
            kv_cache_dtype="float32",
            devices=("simulated",),
            num_blocks=self.num_blocks,
            first_block_id=FIRST_BLOCK_ID,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            buckets=self.buckets,
            vocab_size=self.vocab_size,
            max_num_logprobs=MAX_NUM_LOGPROBS,
            block_bytes=self.block_size * 8,  # a stamp of 8 bytes for every slot
            can_mask_tokens=True,
            can_prompt_logprobs=True,
        )


def _read_model_config(model: Path) -> dict[str, object]:
    path = model / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--model: {path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _read_count(config: dict[str, object], name: str, default: int) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"--model: {name} in config.json is {value!r}: it must be a whole number above 0")
    return value


class SimulatedStep:
    """A step whose result is known, but not before the simulated device has come to its end."""

    def __init__(self, result: StepResult, end_ns: int | None) -> None:
        self.pending_result = result
        self.end_ns = end_ns  # of time.monotonic_ns; None: never

    def result(self) -> StepResult:
        if self.end_ns is None:
            threading.Event().wait()
        else:
            _sleep_until(self.end_ns)
        return self.pending_result


class SimulatedRunner:
    """`Runner` that checks and invents. `oracle.findings` counts broken rules by code."""

    def __init__(self, spec: SimulationSpec) -> None:
        self._spec = spec
        self._facts = spec.facts()
        self.oracle = Oracle(self._facts)
        self._seeds = np.zeros(spec.max_num_seqs, dtype=np.uint64)
        self._sequence_indices = np.zeros(spec.max_num_seqs, dtype=np.uint64)
        self._num_logprobs = np.full(spec.max_num_seqs, -1, dtype=np.int64)  # -1: none wanted
        self._restricted = np.zeros(spec.max_num_seqs, dtype=np.bool_)
        self._sampling: list[RowSampling | None] = [None] * spec.max_num_seqs
        self._all_tokens = np.ones(spec.vocab_size, dtype=np.bool_)
        self._num_steps = 0
        self._device_free_ns = 0

    def describe(self) -> WorkerFacts:
        return self._facts

    def reset(self) -> None:
        self.oracle.reset()

    def close(self) -> None:
        findings = {code.name: count for code, count in self.oracle.findings.items()}
        logger.info("simulation closed", num_steps=self._num_steps, findings=findings)

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> SimulatedStep:
        started_ns = time.monotonic_ns()
        self._num_steps += 1
        if self._num_steps == self._spec.crash_at_step:
            raise SimulatedFailure(f"sim_crash_at_step is {self._num_steps}")
        if self._num_steps == self._spec.drop_stream_at_step:
            raise SessionEnded(f"sim_drop_stream_at_step is {self._num_steps}")
        checked = self._check(batch)
        for add in batch.adds:
            self._remember_sampling(add.row, add.sampling)
        # The device takes the step when it is done with the one before.
        inputs_ready_ns = time.monotonic_ns()
        forward_ns = self._duration_ns(batch)
        self._device_free_ns = max(inputs_ready_ns, self._device_free_ns) + forward_ns
        mask = None
        if len(batch.mask_rows):
            mask = wait_for_mask()
            self._device_free_ns = max(self._device_free_ns, time.monotonic_ns())
        sampling_ns = time.monotonic_ns()
        result = self._sample(batch, checked, mask)
        result.input_ns = inputs_ready_ns - started_ns
        result.forward_ns = forward_ns
        result.sample_ns = time.monotonic_ns() - sampling_ns
        if self._num_steps == self._spec.out_of_order_at_step:
            result.step_id += 1
        return SimulatedStep(result, None if self._num_steps == self._spec.hang_at_step else self._device_free_ns)

    def _check(self, batch: StepBatch) -> CheckedStep:
        num_findings = self.oracle.findings.total()
        try:
            check_step(batch, self._facts)
            checked = self.oracle.apply(batch)
        except StepError as error:
            if self._spec.strict:
                raise SimulatedFailure(f"sim_strict: {error}") from error
            raise
        if self.oracle.findings.total() > num_findings:
            found = [f"row {fault.row}: {fault.code.name}: {fault.message}" for fault in checked.faults]
            logger.warning("step breaks the contract", step_id=batch.step_id, findings=found)
            if self._spec.strict:
                raise SimulatedFailure(f"sim_strict: {'; '.join(found)}")
        self._plant_token_failures(checked)
        return checked

    def _plant_token_failures(self, checked: CheckedStep) -> None:
        if self._spec.poison_token is not None and (checked.token_ids == self._spec.poison_token).any():
            raise SimulatedFailure(f"a row ran sim_poison_token {self._spec.poison_token}")
        if self._spec.fault_row_token is None:
            return
        faulty_runs = np.unique(checked.run_of_token[checked.token_ids == self._spec.fault_row_token])
        checked.samples = checked.samples.copy()  # it may be a view of the batch
        checked.samples[faulty_runs] = False
        message = f"the logits are not finite (sim_fault_row_token {self._spec.fault_row_token})"
        for row in checked.rows[faulty_runs].tolist():
            checked.faults.append(RowFault(row=row, code=RowFaultCode.NOT_FINITE, message=message))
            self.oracle.forget(row)

    def _remember_sampling(self, row: int, sampling: RowSampling) -> None:
        self._sampling[row] = sampling
        self._seeds[row] = sampling.seed
        self._sequence_indices[row] = sampling.sequence_index
        self._num_logprobs[row] = -1 if sampling.num_logprobs is None else sampling.num_logprobs
        lists = (sampling.bias_token_ids, sampling.suppressed_token_ids, sampling.allowed_token_ids)
        self._restricted[row] = any(len(token_ids) for token_ids in lists)

    def _duration_ns(self, batch: StepBatch) -> int:
        if len(batch.run_rows) == 0:
            return 0
        spec = self._spec
        num_tokens = max(batch.bucket, batch.num_tokens)  # padding is computed too
        duration_us = spec.step_ms * 1e3 + spec.token_us * num_tokens + spec.row_us * len(batch.run_rows)
        if self._num_steps == spec.delay_at_step:
            duration_us += spec.delay_s * 1e6
        return int(duration_us * 1e3)

    def _sample(self, batch: StepBatch, checked: CheckedStep, mask: TokenMask | None) -> StepResult:
        spec = self._spec
        rows = checked.rows[checked.samples]
        positions = self.oracle.num_tokens[rows]
        hashes = simulated_tokens.draw_hash(
            self._seeds[rows], self._sequence_indices[rows], positions.astype(np.uint64)
        )
        token_ids = simulated_tokens.draw_tokens(hashes, spec.vocab_size, spec.eos_token_id, spec.eos_probability)
        faults = checked.faults
        restricted = self._restricted[rows]
        if mask is not None:
            restricted = restricted | np.isin(rows, mask.rows)
        if restricted.any():
            drawable = np.ones(len(rows), dtype=np.bool_)
            for i in np.flatnonzero(restricted).tolist():
                token_id = self._draw_restricted(int(rows[i]), hashes[i], mask)
                if token_id is None:
                    drawable[i] = False
                    message = "no token may be drawn: mask, allowed, suppressed and biased tokens leave none"
                    faults.append(RowFault(row=int(rows[i]), code=RowFaultCode.NOT_FINITE, message=message))
                    self.oracle.forget(int(rows[i]))
                else:
                    token_ids[i] = token_id
            rows, hashes, token_ids = rows[drawable], hashes[drawable], token_ids[drawable]
        self.oracle.append(rows, token_ids)
        result = StepResult(
            step_id=batch.step_id,
            rows=rows.astype(np.uint32),
            offsets=np.arange(len(rows) + 1, dtype=np.uint32),
            token_ids=token_ids,
            faults=faults,
        )
        self._add_logprobs(result, rows, hashes, token_ids)
        result.prompt_logprobs = self._describe_prompts(checked, {fault.row for fault in faults})
        return result

    def _describe_prompts(self, checked: CheckedStep, failed: set[int]) -> list[PromptLogprobs]:
        described = []
        counts = np.bincount(checked.run_of_token, minlength=len(checked.rows))
        for row, count in zip(checked.rows.tolist(), counts.tolist(), strict=True):
            sampling = self._sampling[row]
            if row in failed or sampling is None or sampling.num_prompt_logprobs is None:
                continue
            start = int(self.oracle.num_computed[row]) - count + 1
            stop = min(start + count, int(self.oracle.num_prompt_tokens[row]))
            if start >= stop:
                continue
            token_ids = self.oracle.tokens[row, start:stop].copy()
            hashes = simulated_tokens.prompt_hash(token_ids, np.arange(start, stop, dtype=np.uint64))
            num_top = sampling.num_prompt_logprobs
            logprobs, top_ids, top = simulated_tokens.logprobs_of(hashes, token_ids, num_top, self._spec.vocab_size)
            ranks = np.minimum(hashes >> np.uint64(62), self._spec.vocab_size - 1).astype(np.uint32) + np.uint32(1)
            described.append(PromptLogprobs(row, start, logprobs, ranks, top_ids, top))
        return described

    def _draw_restricted(self, row: int, draw: np.uint64, mask: TokenMask | None) -> int | None:
        spec, sampling = self._spec, self._sampling[row]
        if sampling is None:
            raise SimulatedFailure(f"row {row} samples, but was never added")
        allowed = self._all_tokens
        if mask is not None:
            index = np.flatnonzero(mask.rows == row)
            if len(index):
                allowed = simulated_tokens.unpack_mask(mask.bitmask[index[0]], spec.vocab_size)
        num_generated = int(self.oracle.num_tokens[row] - self.oracle.num_prompt_tokens[row])
        candidates = simulated_tokens.restricted_candidates(sampling, num_generated, allowed)
        return simulated_tokens.draw_token_among(draw, candidates, sampling, spec.eos_token_id, spec.eos_probability)

    def _add_logprobs(self, result: StepResult, rows: IntArray, hashes: UInt64Array, token_ids: UInt32Array) -> None:
        wanted = self._num_logprobs[rows]
        if len(rows) == 0 or wanted.max() < 0:
            return
        num_top = int(wanted.max())
        logprobs, top_token_ids, top_logprobs = simulated_tokens.logprobs_of(
            hashes, token_ids, num_top, self._spec.vocab_size
        )
        logprobs[wanted < 0] = np.nan
        result.logprobs = logprobs
        if num_top:
            result.top_token_ids, result.top_logprobs = top_token_ids, top_logprobs


_timer_slack_set = threading.local()


def _sleep_until(end_ns: int) -> None:
    """Sleep to within some 10 us of `end_ns`, without spinning."""
    if not getattr(_timer_slack_set, "done", False):
        # The kernel may wake a sleeper 50 us late unless its thread asks for better.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        _timer_slack_set.done = True
    while (remaining_ns := end_ns - time.monotonic_ns()) > 0:
        time.sleep(remaining_ns * 1e-9)

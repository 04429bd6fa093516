"""Steps to and from worker.proto: the only place that knows how a row's deltas look on the wire."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from stepwire.v1 import worker_pb2

from control_plane.core.request import PromptLogprobs, SamplingParams, TokenLogprobs, VectorArray
from control_plane.core.step_plan import ProtocolError, RowFailure, RowStart, StepOutcome, StepPlan

PROTOCOL_VERSION = 1

_UINT32 = np.dtype("<u4")
_FLOAT32 = np.dtype("<f4")


def _pack(values: Sequence[int]) -> bytes:
    return array("I", values).tobytes()  # native order is little-endian on every machine that runs this


def _unpack(data: bytes) -> list[int]:
    """Raises `ValueError` if it is not made of whole words. Not by numpy, whose machinery costs more than 256 words."""
    return array("I", data).tolist()


def encode_step(plan: StepPlan, buckets: Sequence[int]) -> worker_pb2.RunStepsRequest:
    """`buckets` are the worker's, ascending; the step is padded to the smallest that holds it."""
    step = worker_pb2.StepBatch(
        step_id=plan.step_id,
        bucket=choose_bucket(plan.num_tokens, buckets),
        run_rows=_pack(plan.rows),
        run_start_positions=_pack(plan.start_positions),
        run_num_tokens=_pack(plan.num_run_tokens),
        run_samples=bytes(plan.samples),
        run_num_new_blocks=_pack(plan.num_new_blocks),
        new_block_ids=_pack(plan.new_block_ids),
    )
    if plan.drop_rows:
        step.drop_rows = _pack(plan.drop_rows)
    if plan.mask_rows:
        step.mask_rows = _pack(plan.mask_rows)
    if plan.starts:
        step.add.extend([_encode_start(start) for start in plan.starts])
    return worker_pb2.RunStepsRequest(step=step)


def encode_mask(step_id: int, rows: Sequence[int], bitmask: npt.NDArray[np.uint32]) -> worker_pb2.RunStepsRequest:
    """bitmask: [num_rows, ceil(vocab_size / 32)]."""
    mask = worker_pb2.TokenMask(
        step_id=step_id, rows=_pack(rows), bitmask=bitmask.astype(_UINT32, copy=False).tobytes()
    )
    return worker_pb2.RunStepsRequest(mask=mask)


def choose_bucket(num_tokens: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `num_tokens`; 0 where the worker has none."""
    if not buckets:
        return 0
    index = bisect_left(buckets, num_tokens)
    if index == len(buckets):
        raise ProtocolError(f"a step of {num_tokens} tokens is larger than the worker's largest bucket, {buckets[-1]}")
    return buckets[index]


def _encode_start(start: RowStart) -> worker_pb2.RowAdd:
    sequence = start.sequence
    pooling = sequence.request.request.pooling
    add = worker_pb2.RowAdd(
        row=start.row,
        token_ids=sequence.token_ids().tobytes(),
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed_tokens=start.num_computed_tokens,
        block_ids=_pack(start.block_ids),
        sampling=_encode_sampling(
            sequence.request.request.sampling,
            sequence.index,
            sequence.request.request.min_tokens,
            sequence.stop_token_ids,
        ),
        pooling=None if pooling is None else worker_pb2.RowPooling(second_text_start=pooling.second_text_start),
    )
    num_prompt_logprobs = sequence.request.request.sampling.num_prompt_logprobs
    if start.asks_prompt_logprobs and num_prompt_logprobs is not None:
        add.sampling.num_prompt_logprobs = num_prompt_logprobs
    return add


def _encode_sampling(
    params: SamplingParams, sequence_index: int, min_tokens: int, stop_token_ids: frozenset[int]
) -> worker_pb2.RowSampling:
    message = worker_pb2.RowSampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        sequence_index=sequence_index,
        allowed_token_ids=_pack(params.allowed_token_ids),
    )
    if params.num_logprobs is not None:
        message.num_logprobs = params.num_logprobs
    if params.logit_bias:
        message.bias_token_ids = _pack(list(params.logit_bias))
        message.bias_values = np.array(list(params.logit_bias.values()), dtype=_FLOAT32).tobytes()
    if min_tokens:
        message.min_tokens = min_tokens
        message.suppressed_token_ids = _pack(sorted(stop_token_ids))
    return message


def decode_result(result: worker_pb2.StepResult, plan: StepPlan) -> StepOutcome:
    """Read a result. Raises `ProtocolError` if its arrays do not fit together or it answers another step."""
    if result.step_id != plan.step_id:
        raise ProtocolError(f"the worker answered step {result.step_id}, expected {plan.step_id}")
    try:
        rows = _unpack(result.rows)
        offsets = _unpack(result.offsets)
        token_ids = _unpack(result.token_ids)
    except ValueError as error:
        raise ProtocolError(f"step {plan.step_id}: an array is not made of whole 32-bit words") from error
    if offsets != list(range(len(rows) + 1)) or len(token_ids) != len(rows):
        raise ProtocolError(
            f"step {plan.step_id}: {len(rows)} rows, {len(offsets)} offsets and "
            f"{len(token_ids)} tokens; one token a row is expected"
        )
    return StepOutcome(
        step_id=plan.step_id,
        rows=rows,
        token_ids=token_ids,
        logprobs=_decode_logprobs(result, rows, plan) if result.logprobs else None,
        failures=[RowFailure(fault.row, _fault_name(fault.code), fault.message) for fault in result.faults],
        vectors=_decode_vectors(result, plan) if result.HasField("pooled") else {},
        prompt_logprobs=_decode_prompt_logprobs(result, plan) if result.prompt_logprobs else {},
    )


def _decode_prompt_logprobs(result: worker_pb2.StepResult, plan: StepPlan) -> dict[int, PromptLogprobs]:
    wanted = {run.row: run.sequence.request.request.sampling.num_prompt_logprobs for run in plan.prompt_logprob_runs}
    parts: dict[int, PromptLogprobs] = {}
    for message in result.prompt_logprobs:
        row = message.row
        if row in parts or row not in wanted:
            raise ProtocolError(f"step {plan.step_id}: prompt logprobs of row {row} were not asked for, or come twice")
        shape = (len(message.logprobs) // 4, message.num_top)
        num_top = wanted[row]
        # Copied: they must not keep the whole message.
        parts[row] = PromptLogprobs(
            message.start_position,
            _matrix(message.logprobs, _FLOAT32, (shape[0], 1))[:, 0].astype(np.float32),
            _matrix(message.ranks, _UINT32, (shape[0], 1))[:, 0].astype(np.uint32),
            _matrix(message.top_token_ids, _UINT32, shape)[:, :num_top].astype(np.uint32),
            _matrix(message.top_logprobs, _FLOAT32, shape)[:, :num_top].astype(np.float32),
        )
    return parts


def _decode_vectors(result: worker_pb2.StepResult, plan: StepPlan) -> dict[int, VectorArray]:
    data = result.pooled
    if len(data.rows) % 4 or len(data.values) % 4 or not data.rows or len(data.values) % len(data.rows):
        raise ProtocolError(
            f"step {plan.step_id}: {len(data.values)} bytes of vectors do not belong to {len(data.rows)} bytes of rows"
        )
    rows = np.frombuffer(data.rows, _UINT32).tolist()
    # Copied: a vector must not keep the whole message.
    values = np.frombuffer(data.values, _FLOAT32).astype(np.float32).reshape(len(rows), -1)
    if len(set(rows)) != len(rows):
        raise ProtocolError(f"step {plan.step_id}: a row has two vectors")
    return dict(zip(rows, values, strict=True))


def _fault_name(code: int) -> str:
    value = worker_pb2.RowFaultCode.DESCRIPTOR.values_by_number.get(code)
    return value.name.removeprefix("ROW_FAULT_CODE_") if value else f"unknown fault {code}"


def _decode_logprobs(result: worker_pb2.StepResult, rows: Sequence[int], plan: StepPlan) -> list[TokenLogprobs | None]:
    values = np.frombuffer(result.logprobs, _FLOAT32)
    shape = (len(rows), result.num_top)
    top_ids = _matrix(result.top_token_ids, _UINT32, shape)
    top_values = _matrix(result.top_logprobs, _FLOAT32, shape)
    if len(values) != len(rows):
        raise ProtocolError(f"step {plan.step_id}: {len(values)} logprobs for {len(rows)} tokens")
    sequence_of = dict(zip(plan.rows, plan.sequences, strict=True))
    decoded: list[TokenLogprobs | None] = []
    for index, row in enumerate(rows):
        wanted = sequence_of[row].request.request.sampling.num_logprobs if row in sequence_of else None
        if wanted is None:
            decoded.append(None)
            continue
        decoded.append(
            TokenLogprobs(float(values[index]), top_ids[index, :wanted].tolist(), top_values[index, :wanted].tolist())
        )
    return decoded


def _matrix(data: bytes, dtype: np.dtype[np.generic], shape: tuple[int, int]) -> npt.NDArray[np.generic]:
    if len(data) != 4 * shape[0] * shape[1]:
        raise ProtocolError(
            f"logprobs hold {len(data)} bytes; {shape[0]} tokens with {shape[1]} each need {4 * shape[0] * shape[1]}"
        )
    return np.frombuffer(data, dtype).reshape(shape)

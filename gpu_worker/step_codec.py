"""Steps and results between protobuf and plain arrays; the worker's side of worker.proto.

Integer arrays are little-endian uint32 `bytes`, read in place with `numpy.frombuffer` (the arrays are read-only views
of the message). A decoded step has passed `step_checks`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from stepwire.v1 import worker_pb2

from gpu_worker.runner_api import (
    BoolArray,
    Float32Array,
    PromptLogprobs,
    RowAdd,
    RowFault,
    RowFaultCode,
    RowPooling,
    RowSampling,
    StepBatch,
    StepError,
    StepResult,
    TokenMask,
    UInt32Array,
    WorkerFacts,
)
from gpu_worker.step_checks import check_step, num_mask_words

PROTOCOL_VERSION = 1

_UINT32 = np.dtype("<u4")
_FLOAT32 = np.dtype("<f4")


# Steps in: protobuf to arrays.


def decode_step(message: worker_pb2.StepBatch, facts: WorkerFacts) -> StepBatch:
    """Read and check one step. Raises `StepError` that names the field and the numbers."""
    batch = StepBatch(
        step_id=message.step_id,
        bucket=message.bucket,
        drop_rows=_uint32(message.drop_rows, "drop_rows"),
        adds=tuple(_decode_add(add, index) for index, add in enumerate(message.add)),
        run_rows=_uint32(message.run_rows, "run_rows"),
        run_start_positions=_uint32(message.run_start_positions, "run_start_positions"),
        run_num_tokens=_uint32(message.run_num_tokens, "run_num_tokens"),
        run_samples=_flags(message.run_samples, "run_samples"),
        run_num_new_blocks=_uint32(message.run_num_new_blocks, "run_num_new_blocks"),
        new_block_ids=_uint32(message.new_block_ids, "new_block_ids"),
        mask_rows=_uint32(message.mask_rows, "mask_rows"),
    )
    check_step(batch, facts)
    return batch


def _decode_add(message: worker_pb2.RowAdd, index: int) -> RowAdd:
    name = f"add[{index}] (row {message.row})"
    if not message.HasField("sampling"):
        raise StepError(f"{name}.sampling is missing")
    return RowAdd(
        row=message.row,
        token_ids=_uint32(message.token_ids, f"{name}.token_ids"),
        num_prompt_tokens=message.num_prompt_tokens,
        num_computed_tokens=message.num_computed_tokens,
        block_ids=_uint32(message.block_ids, f"{name}.block_ids"),
        sampling=_decode_sampling(message.sampling, f"{name}.sampling"),
        pooling=RowPooling(message.pooling.second_text_start) if message.HasField("pooling") else None,
    )


def _decode_sampling(message: worker_pb2.RowSampling, name: str) -> RowSampling:
    return RowSampling(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
        sequence_index=message.sequence_index,
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
        bias_token_ids=_uint32(message.bias_token_ids, f"{name}.bias_token_ids"),
        bias_values=_float32(message.bias_values, f"{name}.bias_values"),
        min_tokens=message.min_tokens,
        suppressed_token_ids=_uint32(message.suppressed_token_ids, f"{name}.suppressed_token_ids"),
        allowed_token_ids=_uint32(message.allowed_token_ids, f"{name}.allowed_token_ids"),
        num_prompt_logprobs=message.num_prompt_logprobs if message.HasField("num_prompt_logprobs") else None,
    )


def decode_mask(message: worker_pb2.TokenMask, mask_rows: UInt32Array, vocab_size: int) -> TokenMask:
    """Read the mask of the step that named `mask_rows`. Raises `StepError`."""
    rows = _uint32(message.rows, "TokenMask.rows")
    if len(np.unique(rows)) != len(rows) or not np.isin(rows, mask_rows).all():
        unknown = np.setdiff1d(rows, mask_rows)
        what = f"holds row {unknown[0]}, which" if len(unknown) else "holds a row twice, so another"
        raise StepError(f"TokenMask.rows of step {message.step_id} {what} is not as in the step's mask_rows")
    num_words = num_mask_words(vocab_size)
    bitmask = _uint32(message.bitmask, "TokenMask.bitmask", len(rows) * num_words)
    return TokenMask(rows=rows, bitmask=bitmask.reshape(len(rows), num_words))


# Results out: arrays to protobuf.


def encode_result(result: StepResult, queue_ns: int) -> worker_pb2.StepResult:
    """A result as it travels, with how long its step waited before it started."""
    message = worker_pb2.StepResult(
        step_id=result.step_id,
        rows=_bytes(result.rows, _UINT32),
        offsets=_bytes(result.offsets, _UINT32),
        token_ids=_bytes(result.token_ids, _UINT32),
        faults=[
            worker_pb2.RowFault(row=f.row, code=worker_pb2.RowFaultCode.Name(int(f.code)), message=f.message)
            for f in result.faults
        ],
        timings=worker_pb2.StepTimings(
            queue_ns=queue_ns,
            input_ns=result.input_ns,
            forward_ns=result.forward_ns,
            sample_ns=result.sample_ns,
        ),
    )
    if result.logprobs is not None:
        message.logprobs = _bytes(result.logprobs, _FLOAT32)
    if result.top_token_ids is not None and result.top_logprobs is not None:
        message.num_top = result.top_token_ids.shape[1]
        message.top_token_ids = _bytes(result.top_token_ids, _UINT32)
        message.top_logprobs = _bytes(result.top_logprobs, _FLOAT32)
    if result.pooled_rows is not None and result.pooled_values is not None:
        message.pooled.rows = _bytes(result.pooled_rows, _UINT32)
        message.pooled.values = _bytes(result.pooled_values, _FLOAT32)
    message.prompt_logprobs.extend(map(_encode_prompt_logprobs, result.prompt_logprobs))
    return message


def encode_described(result: StepResult) -> worker_pb2.StepResult:
    """What a result tells of prompts, alone."""
    return worker_pb2.StepResult(
        step_id=result.step_id, prompt_logprobs=map(_encode_prompt_logprobs, result.prompt_logprobs)
    )


def decode_described(message: worker_pb2.StepResult) -> list[PromptLogprobs]:
    """What `encode_described` has told. Raises `StepError`."""
    return [_decode_prompt_logprobs(part) for part in message.prompt_logprobs]


def _encode_prompt_logprobs(part: PromptLogprobs) -> worker_pb2.PromptLogprobs:
    return worker_pb2.PromptLogprobs(
        row=part.row,
        start_position=part.start_position,
        logprobs=_bytes(part.logprobs, _FLOAT32),
        ranks=_bytes(part.ranks, _UINT32),
        num_top=part.top_token_ids.shape[1],
        top_token_ids=_bytes(part.top_token_ids, _UINT32),
        top_logprobs=_bytes(part.top_logprobs, _FLOAT32),
    )


def encode_facts(facts: WorkerFacts, instance_id: str, version: str) -> worker_pb2.DescribeResponse:
    pooling = None
    if facts.pooling is not None:
        pooling = worker_pb2.PoolingFacts(
            kind=worker_pb2.PoolingKind.Name(int(facts.pooling.kind)),
            dimensions=facts.pooling.dimensions,
            whole_prompts=facts.pooling.whole_prompts,
            only=facts.pooling.only,
        )
    return worker_pb2.DescribeResponse(
        instance_id=instance_id,
        model=facts.model,
        architecture=facts.architecture,
        dtype=facts.dtype,
        kv_cache_dtype=facts.kv_cache_dtype,
        devices=facts.devices,
        num_blocks=facts.num_blocks,
        first_block_id=facts.first_block_id,
        block_size=facts.block_size,
        max_model_len=facts.max_model_len,
        max_num_seqs=facts.max_num_seqs,
        max_num_batched_tokens=facts.max_num_batched_tokens,
        buckets=facts.buckets,
        vocab_size=facts.vocab_size,
        max_num_logprobs=facts.max_num_logprobs,
        capabilities=_capabilities(facts),
        version=version,
        block_bytes=facts.block_bytes,
        pooling=pooling,
        num_stages=facts.num_stages,
        weights_per_token=facts.weights_per_token,
        keeps_row_states=facts.keeps_row_states,
    )


def _capabilities(facts: WorkerFacts) -> list[worker_pb2.Capability]:
    known = (
        (facts.can_mask_tokens, worker_pb2.CAPABILITY_TOKEN_MASK),
        (facts.can_prompt_logprobs, worker_pb2.CAPABILITY_PROMPT_LOGPROBS),
    )
    return [capability for is_there, capability in known if is_there]


# The other directions: what replays recorded steps, relays them to sibling ranks, or drives a worker in a test needs.


def encode_step(batch: StepBatch) -> worker_pb2.StepBatch:
    return worker_pb2.StepBatch(
        step_id=batch.step_id,
        bucket=batch.bucket,
        drop_rows=_bytes(batch.drop_rows, _UINT32),
        add=[_encode_add(add) for add in batch.adds],
        run_rows=_bytes(batch.run_rows, _UINT32),
        run_start_positions=_bytes(batch.run_start_positions, _UINT32),
        run_num_tokens=_bytes(batch.run_num_tokens, _UINT32),
        run_samples=_bytes(batch.run_samples, np.dtype(np.uint8)),
        run_num_new_blocks=_bytes(batch.run_num_new_blocks, _UINT32),
        new_block_ids=_bytes(batch.new_block_ids, _UINT32),
        mask_rows=_bytes(batch.mask_rows, _UINT32),
    )


def _encode_add(add: RowAdd) -> worker_pb2.RowAdd:
    sampling = add.sampling
    message = worker_pb2.RowAdd(
        row=add.row,
        token_ids=_bytes(add.token_ids, _UINT32),
        num_prompt_tokens=add.num_prompt_tokens,
        num_computed_tokens=add.num_computed_tokens,
        block_ids=_bytes(add.block_ids, _UINT32),
        sampling=worker_pb2.RowSampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=sampling.seed,
            sequence_index=sampling.sequence_index,
            bias_token_ids=_bytes(sampling.bias_token_ids, _UINT32),
            bias_values=_bytes(sampling.bias_values, _FLOAT32),
            min_tokens=sampling.min_tokens,
            suppressed_token_ids=_bytes(sampling.suppressed_token_ids, _UINT32),
            allowed_token_ids=_bytes(sampling.allowed_token_ids, _UINT32),
        ),
    )
    if sampling.num_logprobs is not None:
        message.sampling.num_logprobs = sampling.num_logprobs
    if sampling.num_prompt_logprobs is not None:
        message.sampling.num_prompt_logprobs = sampling.num_prompt_logprobs
    if add.pooling is not None:
        message.pooling.second_text_start = add.pooling.second_text_start
        message.pooling.SetInParent()
    return message


def encode_mask(step_id: int, mask: TokenMask) -> worker_pb2.TokenMask:
    return worker_pb2.TokenMask(step_id=step_id, rows=_bytes(mask.rows, _UINT32), bitmask=_bytes(mask.bitmask, _UINT32))


def decode_result(message: worker_pb2.StepResult) -> StepResult:
    """Read one result. Raises `StepError`."""
    rows = _uint32(message.rows, "rows")
    offsets = _uint32(message.offsets, "offsets", len(rows) + 1)
    if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
        raise StepError("offsets must start at 0 and ascend")
    num_tokens, num_top = int(offsets[-1]), message.num_top
    result = StepResult(
        step_id=message.step_id,
        rows=rows,
        offsets=offsets,
        token_ids=_uint32(message.token_ids, "token_ids", num_tokens),
        faults=[RowFault(row=f.row, code=RowFaultCode(f.code), message=f.message) for f in message.faults],
        input_ns=message.timings.input_ns,
        forward_ns=message.timings.forward_ns,
        sample_ns=message.timings.sample_ns,
    )
    if message.logprobs:
        result.logprobs = _float32(message.logprobs, "logprobs", num_tokens)
    if num_top:
        shape = (num_tokens, num_top)
        result.top_token_ids = _uint32(message.top_token_ids, "top_token_ids", num_tokens * num_top).reshape(shape)
        result.top_logprobs = _float32(message.top_logprobs, "top_logprobs", num_tokens * num_top).reshape(shape)
    if message.HasField("pooled"):
        result.pooled_rows = _uint32(message.pooled.rows, "pooled.rows")
        values = _float32(message.pooled.values, "pooled.values")
        if not len(result.pooled_rows) or len(values) % len(result.pooled_rows):
            raise StepError(f"pooled.values has {len(values)} numbers for {len(result.pooled_rows)} rows")
        result.pooled_values = values.reshape(len(result.pooled_rows), -1)
    result.prompt_logprobs = decode_described(message)
    return result


def _decode_prompt_logprobs(message: worker_pb2.PromptLogprobs) -> PromptLogprobs:
    logprobs = _float32(message.logprobs, "prompt_logprobs.logprobs")
    shape = (len(logprobs), message.num_top)
    num_top = shape[0] * shape[1]
    return PromptLogprobs(
        row=message.row,
        start_position=message.start_position,
        logprobs=logprobs,
        ranks=_uint32(message.ranks, "prompt_logprobs.ranks", shape[0]),
        top_token_ids=_uint32(message.top_token_ids, "prompt_logprobs.top_token_ids", num_top).reshape(shape),
        top_logprobs=_float32(message.top_logprobs, "prompt_logprobs.top_logprobs", num_top).reshape(shape),
    )


# One array each.


def _uint32(data: bytes, name: str, length: int | None = None) -> UInt32Array:
    if len(data) % 4:
        raise StepError(f"{name} has {len(data)} bytes: not a whole number of 32-bit integers")
    _check_length(len(data) // 4, name, length)
    return np.frombuffer(data, dtype=_UINT32)


def _float32(data: bytes, name: str, length: int | None = None) -> Float32Array:
    if len(data) % 4:
        raise StepError(f"{name} has {len(data)} bytes: not a whole number of 32-bit floats")
    _check_length(len(data) // 4, name, length)
    return np.frombuffer(data, dtype=_FLOAT32)


def _flags(data: bytes, name: str) -> BoolArray:
    values = np.frombuffer(data, dtype=np.uint8)
    if len(values) and values.max() > 1:
        index = int(np.argmax(values))
        raise StepError(f"{name}[{index}] is {values[index]}: it must be 0 or 1")
    return values.view(np.bool_)


def _check_length(actual: int, name: str, length: int | None) -> None:
    if length is not None and actual != length:
        raise StepError(f"{name} has {actual} entries where {length} are needed")


def _bytes(values: npt.NDArray[np.generic], dtype: np.dtype[np.generic]) -> bytes:
    return np.ascontiguousarray(values, dtype=dtype).tobytes()

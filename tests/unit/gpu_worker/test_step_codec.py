from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire.v1 import worker_pb2

from gpu_worker import step_codec
from gpu_worker.runner_api import (
    PoolingFacts,
    PoolingKind,
    PromptLogprobs,
    RowFault,
    RowFaultCode,
    RowPooling,
    StepBatch,
    StepError,
    StepResult,
    TokenMask,
    WorkerFacts,
)
from gpu_worker.simulated import SimulationSpec
from tests.unit.gpu_worker.step_builder import Run, assert_equal, row_add, sampling, step, uint32

FACTS = SimulationSpec(
    num_blocks=64,
    block_size=4,
    max_num_seqs=8,
    max_model_len=64,
    max_num_batched_tokens=32,
    buckets=(8, 32),
    vocab_size=100,
).facts()
NO_BUCKETS = dataclasses.replace(FACTS, buckets=())
BIG = 2**32 - 1

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
token_ids = st.lists(st.integers(0, 99), max_size=5).map(uint32)


@st.composite
def samplings(draw: st.DrawFn) -> Any:
    biases = draw(st.dictionaries(st.integers(0, 99), st.just(-np.inf) | float32s, max_size=4))
    return sampling(
        temperature=draw(st.floats(0, 2, width=32)),
        top_p=draw(st.floats(0.125, 1, width=32)),
        top_k=draw(st.integers(0, BIG)),
        min_p=draw(st.floats(0, 1, width=32)),
        repetition_penalty=draw(st.floats(0.5, 2, width=32)),
        presence_penalty=draw(float32s),
        frequency_penalty=draw(float32s),
        seed=draw(st.integers(0, 2**64 - 1)),
        sequence_index=draw(st.integers(0, BIG)),
        num_logprobs=draw(st.none() | st.integers(0, BIG)),
        bias_token_ids=uint32(list(biases)),
        bias_values=np.array(list(biases.values()), dtype=np.float32),
        min_tokens=draw(st.integers(0, BIG)),
        suppressed_token_ids=draw(token_ids),
        allowed_token_ids=draw(token_ids),
        num_prompt_logprobs=draw(st.none() | st.integers(0, 20)),
    )


@st.composite
def adds(draw: st.DrawFn, row: int) -> Any:
    tokens = draw(st.lists(st.integers(0, BIG), min_size=1, max_size=64))
    add = row_add(
        row,
        tokens,
        draw(st.lists(st.integers(0, BIG), max_size=16)),
        num_prompt_tokens=draw(st.integers(1, len(tokens))),
        num_computed_tokens=draw(st.integers(0, (len(tokens) - 1) // 4)) * 4,
    )
    return dataclasses.replace(add, sampling=draw(samplings()))


@st.composite
def steps(draw: st.DrawFn) -> StepBatch:
    rows = st.lists(st.integers(0, 7), unique=True, max_size=8)
    runs = [
        Run(
            row,
            draw(st.integers(0, BIG)),
            draw(st.integers(1, 4)),
            draw(st.booleans()),
            draw(st.lists(st.integers(0, BIG), max_size=3)),
        )
        for row in draw(rows)
    ]
    sampling_rows = [run.row for run in runs if run.samples]
    num_tokens = sum(run.num_tokens for run in runs)
    return step(
        draw(st.integers(1, 2**64 - 1)),
        runs,
        adds=[draw(adds(row)) for row in draw(rows)],
        drops=draw(rows),
        mask_rows=draw(st.permutations(sampling_rows)) if draw(st.booleans()) else (),
        bucket=next(bucket for bucket in (8, 32) if bucket >= num_tokens) if runs else 0,
    )


def over_the_wire(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())


@given(steps())
def test_step_round_trip(batch: StepBatch) -> None:
    message = over_the_wire(step_codec.encode_step(batch))
    assert_equal(step_codec.decode_step(message, FACTS), batch)


@st.composite
def results(draw: st.DrawFn) -> StepResult:
    counts = draw(st.lists(st.integers(0, 3), max_size=6))
    num_tokens, num_top = sum(counts), draw(st.integers(0, 3))
    ids = st.integers(0, BIG)
    result = StepResult(
        step_id=draw(st.integers(0, 2**64 - 1)),
        rows=uint32(draw(st.lists(ids, min_size=len(counts), max_size=len(counts)))),
        offsets=uint32(np.cumsum([0, *counts])),
        token_ids=uint32(draw(st.lists(ids, min_size=num_tokens, max_size=num_tokens))),
        faults=draw(
            st.lists(st.builds(RowFault, ids, st.sampled_from(RowFaultCode), st.text(max_size=10)), max_size=3)
        ),
        input_ns=draw(st.integers(0, 2**60)),
        forward_ns=draw(st.integers(0, 2**60)),
        sample_ns=draw(st.integers(0, 2**60)),
    )
    if num_tokens and draw(st.booleans()):
        logprobs = st.lists(float32s | st.just(float("nan")), min_size=num_tokens, max_size=num_tokens)
        result.logprobs = np.array(draw(logprobs), dtype=np.float32)
        if num_top:
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            result.top_token_ids = rng.integers(0, 2**32, size=(num_tokens, num_top), dtype=np.uint32)
            result.top_logprobs = rng.standard_normal((num_tokens, num_top)).astype(np.float32)
    return result


def test_prompt_logprobs_round_trip() -> None:
    rng = np.random.default_rng(3)
    result = StepResult(step_id=1, rows=uint32(), offsets=uint32([0]), token_ids=uint32())
    for row, (num_tokens, num_top) in enumerate([(4, 2), (1, 0), (3, 20)]):
        shape = (num_tokens, num_top)
        result.prompt_logprobs.append(
            PromptLogprobs(
                row,
                7 * row + 1,
                rng.standard_normal(num_tokens).astype(np.float32),
                rng.integers(1, 2**32, num_tokens, dtype=np.uint32),
                rng.integers(0, 2**32, shape, dtype=np.uint32),
                rng.standard_normal(shape).astype(np.float32),
            )
        )
    decoded = step_codec.decode_result(over_the_wire(step_codec.encode_result(result, 0)))
    for mine, theirs in zip(decoded.prompt_logprobs, result.prompt_logprobs, strict=True):
        assert_equal(mine, theirs)


@given(results(), st.integers(0, 2**60))
def test_result_round_trip(result: StepResult, queue_ns: int) -> None:
    message = over_the_wire(step_codec.encode_result(result, queue_ns))
    assert message.timings.queue_ns == queue_ns
    assert_equal(step_codec.decode_result(message), result)


def test_result_with_offsets_that_descend_is_refused() -> None:
    result = StepResult(step_id=1, rows=uint32([1, 2]), offsets=uint32([0, 2, 1]), token_ids=uint32([5]))
    with pytest.raises(StepError, match="offsets must start at 0 and ascend"):
        step_codec.decode_result(step_codec.encode_result(result, 0))


@pytest.mark.parametrize(("vocab_size", "num_words"), [(1, 1), (32, 1), (33, 2), (100, 4)])
def test_mask_round_trip(vocab_size: int, num_words: int) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, size=(2, num_words), dtype=np.uint32)
    mask = TokenMask(rows=uint32([5, 3]), bitmask=words)
    message = over_the_wire(step_codec.encode_mask(9, mask))
    assert message.step_id == 9
    assert_equal(step_codec.decode_mask(message, uint32([3, 5]), vocab_size), mask)


@pytest.mark.parametrize(
    ("rows", "num_words", "message"),
    [
        ([3], 8, "TokenMask.bitmask has 8 entries where 4 are needed"),
        ([3, 6], 8, "holds row 6, which is not as in the step's mask_rows"),
        ([3, 3], 8, "holds a row twice"),
        ([3, 5], 7, "TokenMask.bitmask has 7 entries where 8 are needed"),
    ],
)
def test_mask_that_does_not_fit_its_step(rows: list[int], num_words: int, message: str) -> None:
    mask = worker_pb2.TokenMask(step_id=1, rows=uint32(rows).tobytes(), bitmask=bytes(4 * num_words))
    with pytest.raises(StepError, match=message):
        step_codec.decode_mask(mask, uint32([3, 5]), 100)


def test_facts_are_all_described() -> None:
    message = step_codec.encode_facts(FACTS, "an-instance", "1.2.3")
    for field in dataclasses.fields(WorkerFacts):
        expected = getattr(FACTS, field.name)
        if field.name == "can_mask_tokens":
            assert worker_pb2.CAPABILITY_TOKEN_MASK in message.capabilities
        elif field.name == "can_prompt_logprobs":
            assert worker_pb2.CAPABILITY_PROMPT_LOGPROBS in message.capabilities
        elif field.name == "pooling":
            assert not message.HasField("pooling")
        elif isinstance(expected, tuple):
            assert tuple(getattr(message, field.name)) == expected
        else:
            assert getattr(message, field.name) == expected, field.name
    assert (message.instance_id, message.version) == ("an-instance", "1.2.3")
    plain = step_codec.encode_facts(
        dataclasses.replace(FACTS, can_mask_tokens=False, can_prompt_logprobs=False), "", ""
    )
    assert list(plain.capabilities) == []
    pooling = PoolingFacts(PoolingKind.SCORE, dimensions=1, whole_prompts=True, only=True)
    pools = step_codec.encode_facts(dataclasses.replace(FACTS, pooling=pooling), "", "").pooling
    assert (pools.kind, pools.dimensions, pools.whole_prompts, pools.only) == (2, 1, True, True)


def test_rows_that_pool_and_their_vectors_round_trip() -> None:
    pools = [dataclasses.replace(row_add(row, range(6), [10 + row]), pooling=RowPooling(3 * row)) for row in (0, 1)]
    batch = step(1, [Run(0, 0, 6), Run(1, 0, 6)], adds=[*pools, row_add(2, range(3))])
    facts = dataclasses.replace(FACTS, buckets=())
    decoded = step_codec.decode_step(over_the_wire(step_codec.encode_step(batch)), facts)
    assert [add.pooling for add in decoded.adds] == [RowPooling(0), RowPooling(3), None]
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = StepResult(1, uint32(), uint32([0]), uint32(), pooled_rows=uint32([0, 1]), pooled_values=values)
    assert_equal(step_codec.decode_result(over_the_wire(step_codec.encode_result(result, 0))), result)


def good_step() -> worker_pb2.StepBatch:
    """Two rows run, one of them is added, row 4 is dropped."""
    return step_codec.encode_step(
        step(
            7,
            [Run(1, 4, 2, True, [10]), Run(2, 0, 5, False, [11, 12])],
            adds=[row_add(2, range(6), bias_token_ids=uint32([7]), bias_values=np.array([1.0], dtype=np.float32))],
            drops=[4],
            mask_rows=[1],
            bucket=8,
        )
    )


def packed(*values: int) -> bytes:
    return uint32(values).tobytes()


def change(path: str, value: Any) -> Callable[[worker_pb2.StepBatch], None]:
    def apply(message: worker_pb2.StepBatch) -> None:
        target: Any = message
        *parents, name = path.split(".")
        for parent in parents:
            target = target.add[0] if parent == "add" else getattr(target, parent)
        setattr(target, name, value)

    return apply


MALFORMED = [
    ("run_rows", b"\1\0\0", r"run_rows has 3 bytes: not a whole number of 32-bit integers"),
    ("run_rows", packed(1), r"run_start_positions has 2 entries, and run_rows has 1"),
    ("run_rows", packed(1, 8), r"run_rows\[1\] is 8: rows are below max_num_seqs 8"),
    ("run_rows", packed(1, 1), r"run_rows holds row 1 2 times"),
    ("drop_rows", packed(BIG), r"drop_rows\[0\] is 4294967295: rows are below max_num_seqs 8"),
    ("drop_rows", packed(3, 5, 3), r"drop_rows holds row 3 2 times"),
    ("run_start_positions", packed(4), r"run_start_positions has 1 entries, and run_rows has 2"),
    ("run_num_tokens", packed(2, 5, 1), r"run_num_tokens has 3 entries, and run_rows has 2"),
    ("run_num_tokens", packed(2, 0), r"run_num_tokens\[1\] is 0 \(row 2\)"),
    ("run_num_tokens", packed(30, 3), r"sums to 33, more than max_num_batched_tokens 32"),
    ("run_num_tokens", packed(BIG, BIG), r"sums to 8589934590, more than max_num_batched_tokens 32"),
    ("run_num_tokens", packed(4, 5), r"bucket 8 is smaller than the step's 9 tokens"),
    ("run_samples", b"\1", r"run_samples has 1 entries, and run_rows has 2"),
    ("run_samples", b"\1\2", r"run_samples\[1\] is 2: it must be 0 or 1"),
    ("run_samples", b"\0\0", r"mask_rows holds row 1, which does not sample"),
    ("run_num_new_blocks", packed(1), r"run_num_new_blocks has 1 entries, and run_rows has 2"),
    ("run_num_new_blocks", packed(1, 1), r"run_num_new_blocks sums to 2, but new_block_ids has 3"),
    ("run_num_new_blocks", packed(4, BIG), r"run_num_new_blocks sums to 4294967299, but new_block_ids has 3"),
    ("new_block_ids", packed(1, 2, 3, 4), r"run_num_new_blocks sums to 3, but new_block_ids has 4"),
    ("bucket", 9, r"bucket 9 is not one of the announced \[8, 32\]"),
    ("bucket", 0, r"bucket 0 is not one of the announced"),
    ("mask_rows", packed(2), r"mask_rows holds row 2, which does not sample in this step"),
    ("mask_rows", packed(6), r"mask_rows holds row 6, which does not sample in this step"),
    ("mask_rows", packed(1, 1), r"mask_rows holds row 1 2 times"),
    ("add.row", 8, r"add\[0\].row is 8: rows are below max_num_seqs 8"),
    ("add.token_ids", b"", r"add\[0\] \(row 2\).token_ids has 0 tokens: 1 to max_model_len 64"),
    ("add.token_ids", packed(*range(65)), r"token_ids has 65 tokens: 1 to max_model_len 64"),
    ("add.token_ids", b"\0", r"add\[0\] \(row 2\).token_ids has 1 bytes"),
    ("add.num_prompt_tokens", 0, r"num_prompt_tokens is 0: 1 to all 6 tokens"),
    ("add.num_prompt_tokens", 7, r"num_prompt_tokens is 7: 1 to all 6 tokens"),
    ("add.num_computed_tokens", 6, r"num_computed_tokens is 6: it must be less than the 6 tokens"),
    ("add.num_computed_tokens", 3, r"num_computed_tokens is 3: it must be a multiple of block_size 4"),
    ("add.block_ids", packed(*range(17)), r"block_ids has 17 blocks: max_model_len needs 16 at most"),
    ("add.sampling.temperature", float("nan"), r"sampling.temperature is nan"),
    ("add.sampling.temperature", -1.0, r"sampling.temperature is -1.0"),
    ("add.sampling.top_p", 0.0, r"sampling.top_p is 0.0: it must be above 0 and at most 1"),
    ("add.sampling.top_p", float("nan"), r"sampling.top_p is nan"),
    ("add.sampling.min_p", 1.5, r"sampling.min_p is 1.5"),
    ("add.sampling.repetition_penalty", 0.0, r"sampling.repetition_penalty is 0.0"),
    ("add.sampling.presence_penalty", float("inf"), r"sampling.presence_penalty is inf"),
    ("add.sampling.frequency_penalty", float("nan"), r"sampling.frequency_penalty is nan"),
    ("add.sampling.bias_values", b"", r"bias_values has 0 entries, and bias_token_ids has 1"),
    ("add.sampling.bias_values", np.array([np.nan], "<f4").tobytes(), r"bias_values\[0\] is nan"),
    ("add.sampling.bias_values", np.array([np.inf], "<f4").tobytes(), r"bias_values\[0\] is inf"),
    ("add.sampling.bias_values", b"abc", r"bias_values has 3 bytes: not a whole number of 32-bit floats"),
    ("add.sampling.bias_token_ids", packed(100), r"bias_token_ids holds token 100: tokens are below vocab_size 100"),
    ("add.sampling.suppressed_token_ids", packed(1, 200), r"suppressed_token_ids holds token 200"),
    ("add.sampling.allowed_token_ids", packed(BIG), r"allowed_token_ids holds token 4294967295"),
]


@pytest.mark.parametrize(("path", "value", "message"), MALFORMED)
def test_malformed_step_is_refused_by_name(path: str, value: Any, message: str) -> None:
    broken = good_step()
    step_codec.decode_step(broken, FACTS)
    change(path, value)(broken)
    with pytest.raises(StepError, match=message):
        step_codec.decode_step(over_the_wire(broken), FACTS)


def test_an_added_row_needs_sampling_and_comes_once() -> None:
    broken = good_step()
    broken.add[0].ClearField("sampling")
    with pytest.raises(StepError, match=r"add\[0\] \(row 2\).sampling is missing"):
        step_codec.decode_step(broken, FACTS)
    twice = good_step()
    twice.add.add().CopyFrom(twice.add[0])
    with pytest.raises(StepError, match=r"add\[\].row holds row 2 2 times"):
        step_codec.decode_step(twice, FACTS)


def test_bucket_is_0_where_there_is_none() -> None:
    with pytest.raises(StepError, match="bucket is 8, but this worker announced no buckets"):
        step_codec.decode_step(good_step(), NO_BUCKETS)
    with pytest.raises(StepError, match="bucket is 8 in a step without runs"):
        step_codec.decode_step(worker_pb2.StepBatch(step_id=1, bucket=8), FACTS)
    step_codec.decode_step(worker_pb2.StepBatch(step_id=1), FACTS)


def test_masks_need_the_capability() -> None:
    with pytest.raises(StepError, match="did not announce CAPABILITY_TOKEN_MASK"):
        step_codec.decode_step(good_step(), dataclasses.replace(FACTS, can_mask_tokens=False))


BYTE_FIELDS = [field.name for field in worker_pb2.StepBatch.DESCRIPTOR.fields if field.type == field.TYPE_BYTES]


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(BYTE_FIELDS), st.binary(max_size=24)), st.integers(0, 40), st.booleans())
def test_no_bytes_at_all_raise_anything_but_a_step_error(fields: dict[str, bytes], bucket: int, in_add: bool) -> None:
    message = good_step()
    message.bucket = bucket
    for name, data in fields.items():
        setattr(message, name, data)
    if in_add and fields:
        message.add[0].token_ids = next(iter(fields.values()))
        message.add[0].sampling.allowed_token_ids = next(iter(fields.values()))
    try:
        batch = step_codec.decode_step(message, FACTS)
    except StepError:
        return
    assert batch.run_rows.max(initial=0) < FACTS.max_num_seqs
    assert len(batch.run_rows) == len(batch.run_num_tokens) == len(batch.run_samples)
    assert batch.num_tokens <= FACTS.max_num_batched_tokens

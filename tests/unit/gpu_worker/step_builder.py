"""Short ways to write steps in tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_worker.runner_api import RowAdd, RowSampling, StepBatch, UInt32Array


def uint32(values: Sequence[int] | UInt32Array = ()) -> UInt32Array:
    return np.array(values, dtype=np.uint32)


def sampling(**changes: Any) -> RowSampling:
    values: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 0,
        "sequence_index": 0,
        "num_logprobs": None,
        "bias_token_ids": uint32(),
        "bias_values": np.array([], dtype=np.float32),
        "min_tokens": 0,
        "suppressed_token_ids": uint32(),
        "allowed_token_ids": uint32(),
    }
    return RowSampling(**(values | changes))


def row_add(
    row: int,
    token_ids: Sequence[int],
    block_ids: Sequence[int] = (),
    *,
    num_computed_tokens: int = 0,
    num_prompt_tokens: int | None = None,
    **sampling_changes: Any,
) -> RowAdd:
    return RowAdd(
        row=row,
        token_ids=uint32(token_ids),
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        num_computed_tokens=num_computed_tokens,
        block_ids=uint32(block_ids),
        sampling=sampling(**sampling_changes),
    )


@dataclass
class Run:
    row: int
    start: int
    num_tokens: int = 1
    samples: bool = True
    new_blocks: list[int] = field(default_factory=list)


def step(
    step_id: int,
    runs: Sequence[Run] = (),
    *,
    adds: Sequence[RowAdd] = (),
    drops: Sequence[int] = (),
    mask_rows: Sequence[int] = (),
    bucket: int = 0,
) -> StepBatch:
    return StepBatch(
        step_id=step_id,
        bucket=bucket,
        drop_rows=uint32(drops),
        adds=tuple(adds),
        run_rows=uint32([run.row for run in runs]),
        run_start_positions=uint32([run.start for run in runs]),
        run_num_tokens=uint32([run.num_tokens for run in runs]),
        run_samples=np.array([run.samples for run in runs], dtype=np.bool_),
        run_num_new_blocks=uint32([len(run.new_blocks) for run in runs]),
        new_block_ids=uint32([block for run in runs for block in run.new_blocks]),
        mask_rows=uint32(mask_rows),
    )


def assert_equal(actual: Any, expected: Any) -> None:
    """Equality of dataclasses that hold arrays."""
    assert type(actual) is type(expected)
    for name in actual.__dataclass_fields__:
        left, right = getattr(actual, name), getattr(expected, name)
        if isinstance(right, np.ndarray):
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)
        elif isinstance(right, tuple) and right and hasattr(right[0], "__dataclass_fields__"):
            assert len(left) == len(right), name
            for one, other in zip(left, right, strict=True):
                assert_equal(one, other)
        elif hasattr(right, "__dataclass_fields__"):
            assert_equal(left, right)
        else:
            assert left == right, name

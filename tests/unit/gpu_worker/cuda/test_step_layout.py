"""Shapes, packing, and splitting of step buffers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_kernels.step_input import HEADER_WORDS, MAX_SEGMENT, SEGMENT_WORDS, TableWrite, pack_step
from stepwire_kernels.step_result import RESULT_SLOT_WORD

from gpu_worker.cuda.device_rows import StagedChanges
from gpu_worker.cuda.step_layout import StepPlanner, decode_buckets, mixed_buckets, pack, split_changes


def writes_of(lengths: list[int]) -> list[TableWrite]:
    generator = np.random.default_rng(len(lengths))
    return [
        TableWrite(index % 5, 10_000 * index, generator.integers(-9, 9, length).astype(np.int32))
        for index, length in enumerate(lengths)
    ]


def test_decode_buckets_grow_by_eight() -> None:
    assert decode_buckets(1) == (1,)
    assert decode_buckets(4) == (1, 2, 4)
    assert decode_buckets(20) == (1, 2, 4, 8, 16, 20)
    assert decode_buckets(256)[-3:] == (240, 248, 256)


@given(st.integers(64, 9000))
def test_token_buckets_ascend_within_the_budget(max_tokens: int) -> None:
    buckets = mixed_buckets(max_tokens)
    assert list(buckets) == sorted(set(buckets)) and buckets[0] == 64
    assert buckets[-1] <= max_tokens
    assert all(bucket - below <= max(64, below / 4) for below, bucket in pairwise(buckets))


@given(st.integers(2, 300), st.integers(1, 300), st.integers(0, 5000))
@settings(max_examples=200)
def test_shapes_hold_their_steps(max_num_seqs: int, num_runs: int, num_extra: int) -> None:
    num_runs = min(num_runs, max_num_seqs)
    for with_graphs in (False, True):
        planner = StepPlanner(max_num_seqs, 8192, with_graphs=with_graphs)
        counts = np.ones(num_runs, dtype=np.int64)
        counts[0] += num_extra
        shape = planner._shape(counts, num_runs, num_extra == 0)
        assert shape.num_runs >= num_runs + (not shape.is_decode)
        assert num_runs <= shape.num_logits <= shape.num_runs
        padding = shape.num_tokens - int(counts.sum())
        assert padding >= 0
        assert padding <= (shape.num_runs if shape.is_decode else planner.max_padding_tokens)
        assert shape.num_tokens <= planner.max_tokens and shape.num_runs <= planner.max_runs
        assert shape.has_graph == (shape in set(planner.graph_shapes()))


def test_unseen_runs_fill_their_shape_with_the_scratch_row() -> None:
    planner = StepPlanner(32, 2048, with_graphs=True)
    for shape in planner.graph_shapes():
        runs = planner.unseen_runs(shape, 200)
        if shape.is_decode:
            assert runs is not None and len(runs) == 0
        elif -(-shape.num_tokens // 200) >= shape.num_runs:
            assert runs is None
        else:
            assert runs is not None and int(runs[:, 2].sum()) == shape.num_tokens and runs[:, 2].max() <= 200
            assert (runs[:, 0] == 32).all() and (runs[:, 3] == 0).all()


@given(st.lists(st.integers(1, MAX_SEGMENT), max_size=8), st.integers(0, 5), st.integers(0, 3))
def test_pack_writes_what_the_kernels_read(lengths: list[int], num_runs: int, num_counts: int) -> None:
    writes = writes_of(lengths)
    runs = np.arange(num_runs * 4, dtype=np.int32).reshape(-1, 4)
    recounts = [(index, 2, 3, 0) for index in range(num_counts)]
    out = np.full(20_000, -1, dtype=np.int32)
    used = pack(out, writes, runs, recounts, 3)
    expected = pack_step(writes, runs, np.array(recounts, dtype=np.int32).reshape(-1, 4))
    expected[RESULT_SLOT_WORD] = 3
    assert out[:used].tolist() == expected.tolist()
    assert (out[used:] == -1).all()


@given(st.lists(st.integers(1, 3 * MAX_SEGMENT), max_size=12), st.integers(0, 400), st.integers(0, 4))
def test_changes_are_split_to_fit_and_none_is_lost(lengths: list[int], num_reserved: int, num_counts: int) -> None:
    capacity = 2000
    writes = writes_of(lengths)
    recounts = [(index, 1, 2, 0) for index in range(num_counts)]
    parts = list(split_changes(StagedChanges(writes, recounts), num_reserved, capacity))
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1
        words = HEADER_WORDS + sum(SEGMENT_WORDS + len(write.words) for write in part.writes)
        assert words + (num_reserved + 4 * num_counts if is_last else 0) <= capacity
        assert part.recounts == (recounts if is_last else [])
        assert all(len(write.words) <= MAX_SEGMENT for write in part.writes)
    got: dict[int, dict[int, int]] = {}
    for part in parts:
        for write in part.writes:
            table = got.setdefault(write.table, {})
            table.update({write.destination + offset: int(word) for offset, word in enumerate(write.words)})
    wanted: dict[int, dict[int, int]] = {}
    for write in writes:
        table = wanted.setdefault(write.table, {})
        table.update({write.destination + offset: int(word) for offset, word in enumerate(write.words)})
    assert got == wanted


def test_a_bucket_is_found_for_every_number_of_rows() -> None:
    planner = StepPlanner(50, 512, with_graphs=False)
    for num_rows in range(1, 51):
        bucket = planner.bucket_of(num_rows)
        assert bucket >= num_rows
        assert bucket == min(size for size in planner.buckets if size >= num_rows)
    with pytest.raises(IndexError):
        planner.bucket_of(51)

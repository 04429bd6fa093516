from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_kernels import reference, work_list
from stepwire_kernels.work_list import LATENCY, THROUGHPUT, ChunkPolicy, WorkList

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (query tokens, context before them); a context of None is a padding run.
RUNS = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.none(), st.integers(0, 3000))), min_size=1, max_size=9
)  # fmt: skip
DECODES = st.lists(st.tuples(st.just(1), st.one_of(st.none(), st.integers(0, 200_000))), min_size=1, max_size=9)


def arrays(runs: list[tuple[int, int | None]]) -> tuple[list[int], list[int], list[int]]:
    starts, lens, rows = [0], [], []
    for index, (queries, context) in enumerate(runs):
        starts.append(starts[-1] + queries)
        lens.append(0 if context is None or queries == 0 else context + queries)
        rows.append(index * 3 + 1)
    return starts, lens, rows


def tensors(*lists: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in lists]


def listed(work: WorkList) -> list[tuple[int, ...]]:
    count = int(work.num_records)
    return [tuple(record) for record in work.records[:count].tolist()]


@settings(max_examples=60, deadline=None)
@given(
    runs=st.one_of(RUNS, DECODES),
    window=st.sampled_from([0, 1, 100, 4096]),
    aligned=st.booleans(),
    policy=st.sampled_from([LATENCY, THROUGHPUT, ChunkPolicy(16, 4), ChunkPolicy(64, 16, 24), ChunkPolicy(32, 64, 5)]),
)
def test_decode_list_matches_twin(
    runs: list[tuple[int, int | None]], window: int, aligned: bool, policy: ChunkPolicy
) -> None:
    starts, lens, rows = arrays(runs)
    work = work_list.allocate_decode_list(len(runs), starts[-1], DEVICE, policy=policy)
    work_list.build_decode_list(*tensors(starts, lens, rows), work, window=window, aligned=aligned)
    expected = reference.decode_records(
        starts,
        lens,
        rows,
        window=window,
        aligned=aligned,
        min_chunk=policy.min_chunk,
        max_chunks=policy.max_chunks,
        wanted_records=policy.wanted_records,
    )
    assert listed(work) == expected
    assert len(expected) <= work.capacity
    if max(queries for queries, _ in runs) <= 1:
        assert len(expected) <= policy.most_records(len(runs), max(lens))
    for run, (token, first_record, num_chunks, _) in enumerate(work.runs.tolist()):
        own = [record for record in expected if record[0] == run and lens[run] > 0]
        assert num_chunks == len(own)
        assert not own or (token, first_record) == (own[0][2], own[0][6])


def test_chunks_a_little_shorter_than_the_shares_fit_the_most_records() -> None:
    policy = ChunkPolicy(32, 64, 192)
    # Windows of 49.5 chunks, which touch 51, and a run whose share is rounded up: as many records as shares allow.
    lens = [1615, 1615, 1615, 1552]
    records = reference.decode_records(
        list(range(5)), lens, [1, 2, 3, 4], window=1584, min_chunk=32, max_chunks=64, wanted_records=192
    )
    assert len(records) <= policy.most_records(len(lens), max(lens))


@settings(max_examples=25, deadline=None)
@given(runs=RUNS, tile_tokens=st.sampled_from([1, 5, 18, 32]), min_queries=st.sampled_from([1, 2]))
def test_prefill_list_matches_twin(runs: list[tuple[int, int | None]], tile_tokens: int, min_queries: int) -> None:
    starts, lens, rows = arrays(runs)
    work = work_list.allocate_prefill_list(len(runs), starts[-1], tile_tokens, DEVICE)
    work_list.build_prefill_list(*tensors(starts, lens, rows), work, tile_tokens=tile_tokens, min_queries=min_queries)
    expected = reference.prefill_records(starts, lens, rows, tile_tokens=tile_tokens, min_queries=min_queries)
    assert listed(work) == expected
    assert len(expected) <= work.capacity


def test_a_run_keeps_its_chunks_whatever_the_batch() -> None:
    alone = work_list.allocate_decode_list(1, 1, DEVICE)
    work_list.build_decode_list(*tensors([0, 1], [9000], [4]), alone)
    batch = work_list.allocate_decode_list(3, 3, DEVICE)
    work_list.build_decode_list(*tensors([0, 1, 2, 3], [70_000, 9000, 12], [1, 4, 2]), batch)
    ranges = [record[4:6] for record in listed(batch) if record[0] == 1]
    assert ranges == [record[4:6] for record in listed(alone)]


@pytest.mark.parametrize(
    ("lens", "chunks"),
    [
        ([1100] * 4, [9] * 4),  # 4,400 tokens to 48 chunks of 91: parts of 128
        ([1100] * 60, [1] * 60),  # of 1,375
        ([8200] * 60, [4] * 60),  # none beyond 2,048, and its parts are alike
        ([8200] * 3 + [40], [15, 15, 15, 1]),
    ],
)
def test_a_step_has_as_many_chunks_as_keep_the_device_busy(lens: list[int], chunks: list[int]) -> None:
    num_runs = len(lens)
    work = work_list.allocate_decode_list(num_runs, num_runs, DEVICE, policy=work_list.chunk_policy_for(num_runs, 8))
    work_list.build_decode_list(*tensors(list(range(num_runs + 1)), lens, list(range(num_runs))), work)
    assert [num_chunks for _, _, num_chunks, _ in work.runs.tolist()] == chunks
    assert int(work.num_records) <= work.capacity


def test_mismatched_arrays_are_refused() -> None:
    work = work_list.allocate_decode_list(2, 2, DEVICE)
    with pytest.raises(ValueError, match="need 3 query_starts"):
        work_list.build_decode_list(*tensors([0, 1], [5, 5], [0, 1]), work)
    with pytest.raises(ValueError, match="allocated for 2 runs, got 1"):
        work_list.build_decode_list(*tensors([0, 1], [5], [0]), work)
    with pytest.raises(ValueError, match="min_chunk must be a power of two, got 100"):
        ChunkPolicy(min_chunk=100)

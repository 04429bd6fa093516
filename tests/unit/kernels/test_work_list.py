from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_kernels import reference, work_list
from stepwire_kernels.decode_list import build_decode_list
from stepwire_kernels.work_list import SharePolicy, WorkList

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (query tokens, context before them); a context of None is a padding run.
RUNS = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.none(), st.integers(0, 3000))), min_size=1, max_size=9
)  # fmt: skip


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
    count = int(work.num_records[0])
    return [tuple(record) for record in work.records[:count].tolist()]


def check_runs_of_list(work: WorkList, expected: list[tuple[int, ...]], lens: list[int]) -> None:
    for run, (token, first_record, num_chunks, _) in enumerate(work.runs.tolist()):
        own = [record for record in expected if record[0] == run and lens[run] > 0]
        assert num_chunks == len(own)
        assert not own or (token, first_record) == (own[0][2], own[0][6])


@settings(max_examples=100, deadline=None)
@given(
    runs=st.one_of(
        RUNS, st.lists(st.tuples(st.just(1), st.one_of(st.none(), st.integers(0, 9_000))), min_size=1, max_size=20)
    ),
    window=st.sampled_from([0, 1, 100, 4096]),
    aligned=st.booleans(),
    policy=st.sampled_from(
        [
            SharePolicy(24),
            SharePolicy(24, short_share=0),
            SharePolicy(5, 32, 32, 0),
            SharePolicy(1, 16, 48),
            SharePolicy(300, 16, 16),
            SharePolicy(300, 16, 16, 0, most_pieces=7),
            SharePolicy(40, 32, 96, 4096, most_pieces=7),
        ]
    ),
)
def test_shares_match_twin(runs: list[tuple[int, int | None]], window: int, aligned: bool, policy: SharePolicy) -> None:
    starts, lens, rows = arrays(runs)
    work = work_list.allocate_decode_list(len(runs), starts[-1], DEVICE, policy)
    # As many shares as others have that use the same tensors.
    work = dataclasses.replace(work, shares=torch.full((policy.num_shares + 9,), -1, dtype=torch.int32, device=DEVICE))
    build_decode_list(*tensors(starts, lens, rows), work, window=window, aligned=aligned)
    expected, first_of_share = reference.share_records(
        starts, lens, rows, window=window, aligned=aligned, num_shares=policy.num_shares, cut=policy.cut,
        min_share=policy.min_share, short_share=policy.short_share, most_pieces=policy.most_pieces,
    )  # fmt: skip
    assert listed(work) == expected
    assert work.num_records.tolist() == [len(expected), first_of_share[-1]]
    assert work.shares.tolist() == [*first_of_share, *[-1] * 8]
    assert first_of_share[-1] <= policy.most_records(len(runs))
    assert all(num_chunks <= policy.most_pieces + 1 for *_, num_chunks in expected)
    check_runs_of_list(work, expected, lens)


@pytest.mark.parametrize(
    ("lens", "num_shares", "num_used"),
    [
        # One long run in all shares would be more pieces than one program adds up soon.
        ([1_000_000], 792, 128),
        ([100] * 64 + [1_000_000], 792, 129),
        ([1_000_000] * 2, 99, 99),
        # Rows that see the same prefix, which is cached once: 32 bits do not hold cuts times shares.
        ([1_000_000] * 100, 1056, 1056),
    ],
)
def test_shares_of_long_runs(lens: list[int], num_shares: int, num_used: int) -> None:
    policy = SharePolicy(num_shares, most_pieces=128)
    work = work_list.allocate_decode_list(len(lens), 0, DEVICE, policy)
    build_decode_list(*tensors(list(range(len(lens) + 1)), lens, list(range(len(lens)))), work)
    records, shares = listed(work), work.shares.tolist()
    assert len(records) <= policy.most_records(len(lens))
    ends = {(run, kv_end) for run, _, _, _, _, kv_end, _, _ in records}
    assert ends >= set(enumerate(lens))
    sizes = [
        sum(-(-(end - start) // policy.cut) for _, _, _, _, start, end, _, _ in records[first:last])
        for first, last in itertools.pairwise(shares)
    ]
    assert sum(size > 0 for size in sizes) == num_used
    assert max(sizes) - min(sizes[:num_used]) <= 1
    assert sum(sizes) == sum(-(-length // policy.cut) for length in lens)


def test_shares_are_alike_however_long_the_runs_are() -> None:
    lens = [1 + 37 * run % 2000 for run in range(90)]
    policy = SharePolicy(66)
    work = work_list.allocate_decode_list(len(lens), len(lens), DEVICE, policy)
    build_decode_list(*tensors(list(range(len(lens) + 1)), lens, list(range(len(lens)))), work)
    records, shares = listed(work), work.shares.tolist()
    cuts = [
        sum(-(-(end - start) // policy.cut) for _, _, _, _, start, end, _, _ in records[first:last])
        for first, last in itertools.pairwise(shares)
    ]
    assert min(cuts) == max(cuts) - 1
    # Every token of every run, once.
    seen = [(record[0], token) for record in records for token in range(record[4], record[5])]
    assert seen == [(run, token) for run, length in enumerate(lens) for token in range(length)]


@settings(max_examples=25, deadline=None)
@given(runs=RUNS, tile_tokens=st.sampled_from([1, 5, 18, 32]), min_queries=st.sampled_from([1, 2]))
def test_prefill_list_matches_twin(runs: list[tuple[int, int | None]], tile_tokens: int, min_queries: int) -> None:
    starts, lens, rows = arrays(runs)
    work = work_list.allocate_prefill_list(len(runs), starts[-1], tile_tokens, DEVICE)
    work_list.build_prefill_list(*tensors(starts, lens, rows), work, tile_tokens=tile_tokens, min_queries=min_queries)
    expected = reference.prefill_records(starts, lens, rows, tile_tokens=tile_tokens, min_queries=min_queries)
    assert listed(work) == expected
    assert len(expected) <= work.capacity


@given(lens=st.lists(st.integers(1, 1500), min_size=1, max_size=16), num_shares=st.sampled_from([64, 99]))
@settings(max_examples=30, deadline=None)
def test_few_runs_are_cut_one_by_one(lens: list[int], num_shares: int) -> None:
    policy = SharePolicy(num_shares, 32, 32)
    work = work_list.allocate_decode_list(len(lens), len(lens), DEVICE, policy)
    build_decode_list(*tensors(list(range(len(lens) + 1)), lens, list(range(len(lens)))), work)
    records, shares = listed(work), work.shares.tolist()
    # A program has one piece, or none.
    assert shares == [*range(len(records)), *[len(records)] * (num_shares + 1 - len(records))]
    total = sum(-(-length // 32) for length in lens)
    assert max(end - start for _, _, _, _, start, end, _, _ in records) <= 32 * -(-total * 4 // (3 * num_shares))


def test_mismatched_arrays_are_refused() -> None:
    work = work_list.allocate_decode_list(2, 2, DEVICE, SharePolicy(4))
    with pytest.raises(ValueError, match="need 3 query_starts"):
        build_decode_list(*tensors([0, 1], [5, 5], [0, 1]), work)
    with pytest.raises(ValueError, match="allocated for 2 runs, got 1"):
        build_decode_list(*tensors([0, 1], [5], [0]), work)
    with pytest.raises(ValueError, match="num_shares must be 1 or more, got 0"):
        SharePolicy(0)
    with pytest.raises(ValueError, match="most_pieces must be 1 or more, got 0"):
        SharePolicy(8, most_pieces=0)
    with pytest.raises(ValueError, match="cut must be a power of two, got 24"):
        SharePolicy(8, cut=24)
    with pytest.raises(ValueError, match="min_share must be a multiple of 32, got 16"):
        SharePolicy(8, min_share=16)

"""Which sums go through mapped memory follows from the measured table, and so does the memory kept for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepwire_kernels.all_reduce import AllReduceTuning, peer_buffers
from stepwire_kernels.all_reduce_choice import AllReduceChoice, all_reduce_choices, choose

from gpu_worker.cuda.early_sums import MIN_ROWS
from gpu_worker.cuda.peer_collectives import MAX_INBOX_BYTES, MAX_SENT_BYTES, Choices, PeerSizes

STAMPED, FLAGGED = AllReduceTuning(), AllReduceTuning(flagged=True)
H100 = "NVIDIA H100 80GB HBM3"


def sizes_of(
    choices: Choices,
    *,
    num_ranks: int = 2,
    hidden_size: int = 4096,
    max_tokens: int = 8192,
    dtype: torch.dtype = torch.bfloat16,
    norms: Choices | None = None,
    begins_sums: bool = True,
) -> PeerSizes:
    return PeerSizes(
        num_ranks=num_ranks,
        hidden_size=hidden_size,
        vocab_size=128256,
        max_logits=256,
        max_tokens=max_tokens,
        max_top=20,
        dtype=dtype,
        sums=choices,
        norms=choices if norms is None else norms,
        begins_sums=begins_sums,
    )


def test_rows_end_where_nccl_was_faster() -> None:
    choices = (
        AllReduceChoice(1 << 19, STAMPED),
        AllReduceChoice(1 << 22, FLAGGED),
        AllReduceChoice(1 << 24, None),
    )
    sizes = sizes_of(choices)
    assert (sizes.max_rows, sizes.stamped_rows) == (512, 64)
    # The kind that reaches further decides; no step has more tokens than it may have.
    assert sizes_of(choices, norms=(AllReduceChoice(1 << 23, FLAGGED),)).max_rows == 1024
    assert sizes_of(choices, max_tokens=96).max_rows == 96


def test_nccl_alone_leaves_one_row() -> None:
    sizes = sizes_of((AllReduceChoice(1 << 24, None),))
    assert (sizes.max_rows, sizes.stamped_rows) == (1, 0)


def test_narrow_rows_are_no_more_than_were_measured() -> None:
    choices = (AllReduceChoice(1 << 21, FLAGGED),)
    assert sizes_of(choices, hidden_size=576).max_rows == sizes_of(choices).max_rows == 256
    assert sizes_of(choices, hidden_size=8192).max_rows == 128


@pytest.mark.parametrize(("num_ranks", "hidden_size"), [(2, 16384), (4, 8192), (8, 16384)])
def test_memory_has_a_bound(num_ranks: int, hidden_size: int) -> None:
    sizes = sizes_of((AllReduceChoice(1 << 30, FLAGGED),), num_ranks=num_ranks, hidden_size=hidden_size)
    # Two places for each rank's row.
    inbox = 2 * num_ranks * sizes.max_rows * 2 * hidden_size
    assert MAX_INBOX_BYTES // 2 < inbox <= MAX_INBOX_BYTES
    assert inbox <= 8 * sizes.words[0] <= 1.01 * MAX_INBOX_BYTES


def test_sums_of_more_tokens_than_have_graphs_may_be_sent_early() -> None:
    choices = (AllReduceChoice(1 << 20, FLAGGED),)
    # All rows of a step, in words of four bytes; two places for them.
    sizes = sizes_of(choices)
    assert sizes.sent_words == 8192 * 2048
    assert 8 * sizes.words[3] >= 2 * 8192 * 8192
    for other in (
        sizes_of(choices, max_tokens=MIN_ROWS - 1),
        sizes_of(choices, num_ranks=4),
        sizes_of(choices, begins_sums=False),
        # Not even so many rows have room.
        sizes_of(choices, hidden_size=32768),
    ):
        assert other.sent_words == other.words[3] == 0


@given(hidden_size=st.integers(1, 40000), max_tokens=st.integers(1, 100000))
def test_memory_of_sums_that_are_sent_has_a_bound(hidden_size: int, max_tokens: int) -> None:
    sizes = sizes_of((AllReduceChoice(1 << 20, FLAGGED),), hidden_size=hidden_size, max_tokens=max_tokens)
    assert 8 * sizes.words[3] <= MAX_SENT_BYTES + (1 << 10)
    assert sizes.sent_words == 0 or sizes.sent_words >= MIN_ROWS * sizes.row_words


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, True), (64, True), (256, True), (257, False), (1024, False)])
def test_a_pair_of_h100_sums_what_was_measured_through_mapped_memory(num_tokens: int, expected: bool) -> None:
    sums, norms = (all_reduce_choices(H100, 2, has_norm=has_norm) for has_norm in (False, True))
    sizes = sizes_of(sums, norms=norms)
    assert (sizes.max_rows >= num_tokens) is expected
    assert (choose(norms, num_tokens * 8192) is not None) is expected
    assert 8 * sizes.words[0] < 40 << 20


@given(
    num_ranks=st.sampled_from((2, 4, 8)),
    hidden_size=st.integers(1, 300),
    reached=st.tuples(st.integers(1, 1 << 21), st.integers(1, 1 << 21)),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
)
def test_regions_hold_what_is_laid_out(
    num_ranks: int, hidden_size: int, reached: tuple[int, int], dtype: torch.dtype
) -> None:
    choices = tuple(
        AllReduceChoice(limit, tuning) for limit, tuning in zip(sorted(reached), (STAMPED, FLAGGED), strict=True)
    )
    sizes = sizes_of(choices, num_ranks=num_ranks, hidden_size=hidden_size, dtype=dtype)
    regions = [torch.zeros(sizes.words[0], dtype=torch.int64) for _ in range(num_ranks)]
    stop = torch.zeros(1, dtype=torch.int32)
    peers = peer_buffers(0, regions, sizes.max_rows, sizes.row_words, stop, sizes.stamped_rows)
    assert len(peers.plain[0]) == 2 * num_ranks * sizes.max_rows * sizes.row_words
    assert len(peers.stamped[0]) == 2 * num_ranks * sizes.stamped_rows * sizes.row_words
    assert len(peers.flags[0]) == 2 * num_ranks * sizes.max_rows
    assert peers.takes(torch.zeros(sizes.max_rows, hidden_size // 2 * 2, dtype=dtype))

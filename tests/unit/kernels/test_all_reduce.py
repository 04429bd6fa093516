"""Ranks are processes here, see all_reduce_ranks.py: they wait for each other as devices do."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepwire_kernels.all_reduce import (
    AllReduceTuning,
    PeerBuffers,
    all_reduce,
    all_reduce_add_rms_norm,
    peer_buffers,
    region_words,
)
from stepwire_kernels.all_reduce_choice import (
    AllReduceChoice,
    all_reduce_choices,
    choose,
    default_choices,
)

from tests.unit.kernels.all_reduce_ranks import cases, usual_cases
from tests.unit.kernels.checks import TOLERANCE


@pytest.mark.parametrize(
    ("size", "which"), [(2, "usual"), *(pytest.param(size, "all", marks=pytest.mark.slow) for size in (2, 3))]
)
def test_ranks_have_the_sum_in_every_way(size: int, which: str) -> None:
    command = [sys.executable, "-m", "tests.unit.kernels.all_reduce_ranks", str(size), which]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(usual_cases() if which == "usual" else cases()) + 1
    for result in found:
        assert result["exit_codes"] == [0] * size, result
        assert result["error"] <= TOLERANCE[getattr(torch, result["dtype"])], result
        assert result["ranks_agree"] and result["same_residuals"], result


def alone(max_rows: int = 4, row_words: int = 8, size: int = 2) -> PeerBuffers:
    """A rank whose peers never come, and which is told not to wait for them."""
    regions = [torch.zeros(region_words(size, max_rows, row_words), dtype=torch.int64) for _ in range(size)]
    return peer_buffers(0, regions, max_rows, row_words, torch.ones(1, dtype=torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [AllReduceTuning(), AllReduceTuning(flagged=True), AllReduceTuning(two_shot=True)])
def test_who_is_told_to_stop_waits_no_more(tuning: AllReduceTuning) -> None:
    all_reduce(torch.ones(1, 1), alone(), tuning=tuning)


@given(size=st.integers(2, 4), max_rows=st.integers(1, 5), row_words=st.integers(1, 4).map(lambda n: 4 * n))
def test_places_of_rows_do_not_overlap(size: int, max_rows: int, row_words: int) -> None:
    """Two places for each source and row, stamped and plain, and a flag for each: all apart, all inside."""
    region = torch.zeros(region_words(size, max_rows, row_words), dtype=torch.int64)
    peers = peer_buffers(0, [region] * size, max_rows, row_words, torch.zeros(1, dtype=torch.int32))
    rows = 2 * size * max_rows
    begin = region.data_ptr()
    spans = sorted(
        (part[0].data_ptr(), part[0].data_ptr() + part[0].numel() * part[0].element_size())
        for part in (peers.stamped, peers.plain, peers.flags)
    )
    assert [part[0].numel() for part in (peers.stamped, peers.plain, peers.flags)] == [
        rows * row_words,
        rows * row_words,
        rows,
    ]
    assert spans[0][0] == begin and spans[-1][1] <= begin + region.numel() * 8
    assert all(former[1] <= later[0] for former, later in itertools.pairwise(spans))
    # Rows begin at 16 bytes, which is what a vector access needs.
    assert all((span[0] - begin) % 16 == 0 for span in spans[:2])


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(5, 4),
        torch.zeros(1, 9),
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(2, 4, dtype=torch.float64),
        torch.zeros(4, 4).t()[:, :2],
    ],
    ids=["rows", "columns", "half a word", "dtype", "strided"],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor) -> None:
    peers = alone()
    assert not peers.takes(x)
    with pytest.raises(ValueError, match="of at most 4 rows"):
        all_reduce(x, peers)


def test_a_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="residual must be the same"):
        all_reduce_add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(4), 1e-5, alone())


def test_rows_that_begin_anywhere_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        peer_buffers(0, [torch.zeros(8, dtype=torch.int64)] * 2, 1, 3, torch.zeros(1, dtype=torch.int32))


@given(
    limits=st.lists(st.integers(1, 1 << 22), unique=True, min_size=1, max_size=6),
    num_bytes=st.integers(1, 1 << 23),
)
def test_the_smallest_choice_that_reaches_is_taken(limits: list[int], num_bytes: int) -> None:
    choices = [AllReduceChoice(limit, AllReduceTuning(num_warps=limit)) for limit in sorted(limits)]
    taken = choose(choices, num_bytes)
    reaching = [limit for limit in limits if limit >= num_bytes]
    assert taken == (AllReduceTuning(num_warps=min(reaching)) if reaching else None)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "a card that nobody has measured"])
@pytest.mark.parametrize("has_norm", [False, True])
def test_every_device_has_choices_and_prompts_go_through_nccl(device: str, size: int, has_norm: bool) -> None:
    choices = all_reduce_choices(device, size, has_norm=has_norm)
    assert list(choices) == sorted(choices, key=lambda choice: choice.max_bytes)
    # A decode of one row, and a prompt of 8,192 tokens.
    assert choose(choices, 8192) is not None
    assert choose(choices, 8192 * 8192) is None


@given(size=st.integers(2, 16))
def test_the_default_sends_fewer_bytes_where_there_are_more_ranks(size: int) -> None:
    small, large = default_choices(size)
    assert small.max_bytes < large.max_bytes
    assert large.tuning == AllReduceTuning(two_shot=size > 2, flagged=True)

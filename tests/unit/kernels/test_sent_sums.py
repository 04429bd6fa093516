"""Ranks are processes here, see sent_sums_ranks.py: one copies into memory that the other reads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepwire_kernels.sent_sums import (
    MAX_PIECES,
    Piece,
    SentBuffers,
    add_sent,
    add_sent_rms_norm,
    send,
    sent_buffers,
    sent_region_words,
)

from tests.unit.kernels.sent_sums_ranks import cases


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_have_the_sum_of_what_was_sent(size: int) -> None:
    command = [sys.executable, "-m", "tests.unit.kernels.sent_sums_ranks", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(cases())
    for result in found:
        assert result["exit_codes"] == [0] * size, result
        assert result["wrong_rounds"] == [], result


def buffers_of(size: int, words: int, rank: int = 0, *, is_stopped: bool = False) -> SentBuffers:
    regions = [torch.zeros(sent_region_words(size, words), dtype=torch.int64) for _ in range(size)]
    return sent_buffers(rank, regions, words, torch.full((1,), int(is_stopped), dtype=torch.int32))


def test_who_is_told_to_stop_waits_no_more() -> None:
    add_sent(torch.ones(1, 4), buffers_of(2, 16, is_stopped=True), Piece(1, 0, 0))


@given(size=st.integers(2, 4), words=st.integers(1, 6).map(lambda n: 4 * n))
def test_places_of_sources_and_their_flags_do_not_overlap(size: int, words: int) -> None:
    """Whoever sends at whatever round: every place is written once, and all memory but alignment is used."""
    regions = [torch.zeros(sent_region_words(size, words), dtype=torch.int64) for _ in range(size)]
    stop = torch.zeros(1, dtype=torch.int32)
    for round_ in (2, 3):
        for rank in range(size):
            rows = torch.full((1, words), 16.0 * round_ + rank + 1)
            for piece in range(MAX_PIECES):
                # All of it with the last one.
                part = rows if piece == MAX_PIECES - 1 else rows[:, :1]
                send(part.contiguous(), sent_buffers(rank, regions, words, stop), Piece(round_, piece, 0))
    for rank, region in enumerate(regions):
        buffers = sent_buffers(rank, regions, words, stop)
        inbox = buffers.inboxes[rank].view(torch.float32)
        others = [other for other in range(size) if other != rank]
        for round_ in (2, 3):
            for source, other in enumerate(others):
                assert (inbox[round_ % 2, source] == 16.0 * round_ + other + 1).all()
        assert sorted(buffers.flags[rank].tolist()) == [2] * (MAX_PIECES * (size - 1)) + [3] * (MAX_PIECES * (size - 1))
        assert int((region == 0).sum()) == 0


@pytest.mark.parametrize(
    ("x", "piece"),
    [
        (torch.zeros(5, 4), Piece(1, 0, 0)),
        (torch.zeros(2, 4), Piece(1, 1, 3)),
        (torch.zeros(2, 4), Piece(1, MAX_PIECES, 0)),
        (torch.zeros(2, 3, dtype=torch.bfloat16), Piece(1, 0, 0)),
        (torch.zeros(2, 4, dtype=torch.float64), Piece(1, 0, 0)),
        (torch.zeros(4, 4).t()[:, :2], Piece(1, 0, 0)),
    ],
    ids=["rows", "rows of all pieces", "pieces", "half a word", "dtype", "strided"],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, piece: Piece) -> None:
    buffers = buffers_of(2, 16, is_stopped=True)
    for launch in (send, add_sent):
        with pytest.raises(ValueError, match="16 of all pieces at most"):
            launch(x, buffers, piece)


def test_a_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="residual must be the same"):
        add_sent_rms_norm(torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(4), 1e-5, buffers_of(2, 16), Piece(1, 0, 0))


def test_summands_that_begin_anywhere_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        buffers_of(2, 6)

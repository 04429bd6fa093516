"""Drawn tokens as words: what the drawing rank sends is what the others read, and when a rank must have read it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.attention.api import StepMetadata
from gpu_worker.input_batch import StepInputs
from gpu_worker.parallel.process_group import Arriving
from gpu_worker.parallel.sampled import UntakenStep, from_words, in_order_of_rows, num_words, to_words
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.sampler import RowSampler, sample
from tests.unit.gpu_worker.step_builder import Run, row_add, sampling, step

VOCAB = 40


def samplers(*num_logprobs: int | None) -> list[RowSampler]:
    prompt = np.array([1, 2, 3], dtype=np.int32)
    return [RowSampler(sampling(temperature=0.0, num_logprobs=count), prompt, 3, VOCAB) for count in num_logprobs]


@pytest.mark.parametrize("asked", [(None, None, None), (None, 0, 2), (5, None, 1)])
def test_words_hold_all_that_was_drawn(asked: tuple[int | None, ...]) -> None:
    rows = samplers(*asked)
    logits = torch.randn(len(rows), VOCAB)
    logits[1, 7] = float("nan")
    sampled = sample(logits, rows, np.full(len(rows), 3))
    words = to_words(sampled, num_words(rows))
    assert tuple(words.shape) == num_words(rows)
    read = from_words(words)
    assert read.faults == sampled.faults and len(read.faults) == 1
    sound = [0, 2]
    np.testing.assert_array_equal(read.token_ids[sound], sampled.token_ids[sound])
    for name in ("logprobs", "top_token_ids", "top_logprobs"):
        ours, theirs = getattr(read, name), getattr(sampled, name)
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("asked", [(None,) * 5, (None, 0, 2, None, 5), (3, None, None, None, None)])
def test_what_ranks_drew_apart_is_what_one_draws(asked: tuple[int | None, ...]) -> None:
    """Five rows over three ranks: two, two and one, of which some asked for nothing or for less than others."""
    rows, positions = samplers(*asked), np.full(len(asked), 3)
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(4))
    logits[3] = float("inf")
    ranks = [ParallelContext(rank, 3) for rank in range(3)]
    parts = []
    for rank in ranks:
        own = rank.own_rows(len(rows))
        drawn = sample(logits[own], rows[own], positions[own])
        parts.append(to_words(drawn, (rank.rows_each(len(rows)), num_words(rows)[1])))
    together = in_order_of_rows(torch.cat(parts, dim=-1), 3, len(rows))
    assert torch.equal(together, to_words(sample(logits, rows, positions), num_words(rows)))


class Never:
    def wait(self) -> None:
        raise AssertionError("nobody may wait for it yet")


def untaken(rows: list[int], blocks: list[int]) -> UntakenStep:
    nothing = np.zeros(0, dtype=np.int64)
    metadata = StepMetadata(0, nothing, nothing, nothing.reshape(0, 0), nothing)
    inputs = StepInputs(nothing, metadata, np.array(rows), nothing, nothing)
    return UntakenStep(inputs, Arriving(Never(), torch.zeros(0)), np.array(blocks))


@pytest.mark.parametrize(
    ("batch", "touches"),
    [
        (step(2, [Run(3, 5)]), False),
        (step(2, [Run(1, 5)]), True),
        (step(2, [Run(3, 5)], drops=[2]), True),
        (step(2, [Run(2, 0)], adds=[row_add(2, [1], [9])], drops=[2]), True),
        # A block of a row that may have failed, written again; one that is only read does no harm.
        (step(2, [Run(3, 5, new_blocks=[11])]), True),
        (step(2, [Run(4, 0)], adds=[row_add(4, [1], [12])]), True),
        (step(2, [Run(4, 4)], adds=[row_add(4, [1] * 5, [12, 13], num_computed_tokens=4)]), False),
    ],
)
def test_a_step_waits_for_tokens_only_where_it_touches_their_rows_or_blocks(batch: object, touches: bool) -> None:
    assert untaken([1, 2], [11, 12]).is_touched_by(batch, block_size=4) == touches  # type: ignore[arg-type]

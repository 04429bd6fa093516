"""The result record against its twin."""

from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference_steps, step_result
from stepwire_kernels.sampler import Sampled
from stepwire_kernels.step_input import HEADER_WORDS, StepInput, allocate_step_input

UNWRITTEN = -77


def random_sampled(max_runs: int, max_top: int, device: str) -> Sampled:
    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 50_000, shape, dtype=torch.int32, device=device)

    return Sampled(
        token_ids=ids(max_runs),
        logprobs=-torch.rand(max_runs, device=device),
        faults=torch.randint(0, 5, (max_runs,), dtype=torch.int32, device=device),
        top_ids=ids(max_runs, max_top),
        top_logprobs=-torch.rand(max_runs, max_top, device=device),
    )


def random_step(max_runs: int, device: str) -> StepInput:
    step = allocate_step_input(max_runs, max_runs, device)
    step.faults.copy_(torch.randint(0, 2, (max_runs,), dtype=torch.int32))
    return step


@pytest.mark.parametrize(
    ("max_runs", "num_runs", "max_top"), [(1, 1, 0), (9, 5, 0), (140, 133, 0), (37, 36, 20), (5, 3, 1)]
)
def test_results_of_a_step_are_in_the_slot_it_names(max_runs: int, num_runs: int, max_top: int, device: str) -> None:
    sampled, step = random_sampled(max_runs, max_top, device), random_step(max_runs, device)
    words = step_result.result_slot_words(max_runs, max(max_top, 2))
    ring = torch.full((3, words), UNWRITTEN, dtype=torch.int32, device=device)
    buffer = torch.zeros(HEADER_WORDS, dtype=torch.int32, device=device)
    buffer[step_result.RESULT_SLOT_WORD] = 2
    step_result.pack_result(buffer, sampled, step, num_runs, ring, max_runs)
    expected = torch.full((words,), UNWRITTEN, dtype=torch.int32, device=device)
    reference_steps.pack_result(sampled, step, num_runs, expected, max_runs)
    assert ring[2].tolist() == expected.tolist()
    assert (ring[:2] == UNWRITTEN).all()


@pytest.mark.gpu
def test_the_ring_may_be_page_locked_memory_of_the_host(device: str) -> None:
    sampled, step = random_sampled(20, 3, device), random_step(20, device)
    words = step_result.result_slot_words(20, 3)
    ring = torch.full((2, words), UNWRITTEN, dtype=torch.int32).pin_memory()
    buffer = torch.zeros(HEADER_WORDS, dtype=torch.int32, device=device)
    buffer[step_result.RESULT_SLOT_WORD] = 1
    step_result.pack_result(buffer, sampled, step, 20, ring, 20)
    torch.cuda.synchronize()
    expected = torch.full((words,), UNWRITTEN, dtype=torch.int32, device=device)
    reference_steps.pack_result(sampled, step, 20, expected, 20)
    assert ring[1].tolist() == expected.tolist() and (ring[0] == UNWRITTEN).all()


def test_slots_that_are_too_small_are_refused(device: str) -> None:
    sampled, step = random_sampled(4, 5, device), random_step(4, device)
    ring = torch.zeros((1, step_result.result_slot_words(4, 4)), dtype=torch.int32, device=device)
    buffer = torch.zeros(HEADER_WORDS, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="56 words"):
        step_result.pack_result(buffer, sampled, step, 4, ring, 4)

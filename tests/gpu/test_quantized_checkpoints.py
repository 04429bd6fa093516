"""Real quantized checkpoints served by the CUDA runner: packed weights, compiled kernels, the reference's tokens."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.config import WorkerSettings
from gpu_worker.cuda.loading import load_cuda_runner
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.quant.paged_model import fixture
from tests.unit.gpu_worker.quant.test_real_checkpoints import TOLERANCES, prompts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", TOLERANCES)
def test_the_first_clear_tokens_are_those_of_the_reference(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    settings = WorkerSettings(
        model=fixture(name), device="cuda", max_model_len=256, max_num_seqs=4, gpu_memory_utilization=0.3
    )
    driver = StepDriver(load_cuda_runner(settings, torch.device("cuda", 0)))
    for row, case in enumerate(prompts(name)):
        driver.add(row, case["prompt_ids"], greedy())
        tokens = [int(driver.step({row: len(case["prompt_ids"])}).token_ids[0])]
        for _ in range(3):
            tokens.append(int(driver.step({row: 1}).token_ids[0]))
        # bfloat16 sums decide near ties otherwise; what is clear must be the same up to the first unclear token.
        for token, expected, margin in zip(tokens, case["generated_ids"], case["margin"], strict=False):
            if margin < 0.5:
                break
            assert token == expected

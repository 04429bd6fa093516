"""`--deterministic` through the CUDA runner's program under the interpreter: one kernel for prompts and decodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.cuda.inline_runner import load_inline
from tests.unit.gpu_worker.cuda.test_runner import save_model

PROMPT = [(7 * number) % 300 for number in range(21)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("tiny")
    save_model(made, "llama")
    return made


def tokens_of(driver: StepDriver, schedule: list[dict[int, int] | None]) -> list[int]:
    for runs in schedule:
        result = driver.step(runs)
        assert not result.faults
    return driver.rows[0].tokens[len(PROMPT) :]


@pytest.mark.slow
def test_chunks_and_neighbours_give_the_tokens_of_the_usual_kernels(directory: Path) -> None:
    usual = StepDriver(load_inline(directory))
    usual.add(0, PROMPT, greedy())
    expected = tokens_of(usual, [None] * 4)
    driver = StepDriver(load_inline(directory, deterministic=True))
    driver.add(0, PROMPT, greedy())
    # A chunk of one token, a prompt's rest beside another row, decodes of two rows.
    tokens_of(driver, [{0: 1}, {0: 7}])
    driver.add(2, PROMPT[:5], greedy())
    assert tokens_of(driver, [{2: 5, 0: 13}, None, None, None]) == expected

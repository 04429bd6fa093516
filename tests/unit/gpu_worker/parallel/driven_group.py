"""A group of CPU ranks, driven without a control plane: rows of every kind of sampling in one batch.

    python -m tests.unit.gpu_worker.parallel.driven_group MODEL_DIR TENSOR_PARALLEL_SIZE PIPELINE_PARALLEL_SIZE

Prints a JSON line: what its results said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gpu_worker.config import WorkerSettings
from gpu_worker.parallel.leader import load_group_runner
from gpu_worker.runner_api import RowSampling, TokenMask
from load_tests.cpu_worker.step_driver import StepDriver, greedy, sampling

NUM_STEPS = 6
# As many as no number of ranks divides.
KINDS: list[RowSampling] = [
    greedy(),
    sampling(seed=1),
    sampling(seed=2, top_k=12, num_logprobs=0),
    sampling(seed=3, top_p=0.7, temperature=1.3),
    greedy(num_logprobs=3),
    sampling(seed=4, min_p=0.05, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2),
    sampling(seed=5, bias={7: 3.0, 290: 2.0}, suppressed=[5, 11], min_tokens=3),
]


def settings_for(directory: Path, **fields: Any) -> WorkerSettings:
    return WorkerSettings(
        model=directory, device="cpu", dtype="float32", num_threads=1, cpu_kv_cache_gib=0.01, max_model_len=96, **fields
    )


def drive(driver: StepDriver) -> dict[str, Any]:
    """Tokens of every row, and the log-probabilities of those that ask."""
    for row, kind in enumerate(KINDS):
        driver.add(row, range(3 + row, 9 + 2 * row), kind)
    logprobs: list[list[float]] = []
    bits = np.zeros((1, -(-driver.facts.vocab_size // 32)), dtype=np.uint32)
    bits[0, 1:3] = 0b1010101
    for step in range(NUM_STEPS):
        # A grammar's mask for one row, now and then.
        mask = TokenMask(np.array([1], dtype=np.uint32), bits) if step % 2 else None
        result = driver.step(mask=mask)
        assert result.logprobs is not None and result.top_logprobs is not None
        for row, logprob, top in zip(result.rows, result.logprobs, result.top_logprobs, strict=True):
            if KINDS[int(row)].num_logprobs is not None:
                logprobs.append([float(logprob), *top[: KINDS[int(row)].num_logprobs].tolist()])
    # Fewer rows than ranks.
    driver.step({0: 1})
    return {"tokens": [driver.rows[row].tokens for row in range(len(KINDS))], "logprobs": logprobs}


def main(argv: list[str]) -> None:
    sizes = {"tensor_parallel_size": int(argv[1]), "pipeline_parallel_size": int(argv[2])}
    runner = load_group_runner(settings_for(Path(argv[0]), **sizes))
    try:
        print(json.dumps(drive(StepDriver(runner))))
    finally:
        runner.close()


if __name__ == "__main__":
    main(sys.argv[1:])

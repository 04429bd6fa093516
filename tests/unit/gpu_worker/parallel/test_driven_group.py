"""Ranks that each draw for some of the rows give what one rank draws, whatever rows ask for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.step_driver import StepDriver
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny
from tests.unit.gpu_worker.parallel import driven_group
from tests.unit.gpu_worker.parallel.test_shares import ROOT


@pytest.mark.parametrize(
    ("tensor", "pipeline"),
    [(2, 1), pytest.param(3, 1, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_a_group_draws_what_one_rank_draws(tmp_path: Path, tensor: int, pipeline: int) -> None:
    # A vocabulary of 301, which no number of ranks divides.
    save_tiny("llama-tied-bias", tmp_path, **({"num_key_value_heads": 3} if tensor == 3 else {}))
    expected = driven_group.drive(StepDriver(TorchRunner.load(driven_group.settings_for(tmp_path))))
    done = subprocess.run(
        [sys.executable, "-m", driven_group.__name__, str(tmp_path), str(tensor), str(pipeline)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "proto", "kernels"))},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["tokens"] == expected["tokens"]
    assert len(found["logprobs"]) == len(expected["logprobs"]) == 2 * driven_group.NUM_STEPS
    for ours, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)

"""Sums over two ranks through mapped memory, compiled: see all_reduce_ranks.py for the checks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.gpu.all_reduce_ranks import CHECKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """Problem by check; all checks run in one pair of processes, in order, up to the first that fails."""
    command = [sys.executable, "-m", "tests.gpu.all_reduce_ranks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    problems = {line["check"]: line["problem"] for line in sorted(lines, key=lambda line: bool(line["problem"]))}
    assert done.returncode == 0, f"{problems}\n{done.stderr[-4000:]}"
    return problems


@pytest.mark.parametrize("check", list(CHECKS))
def test_ranks_add_up(found: dict[str, str], check: str) -> None:
    assert found.get(check, "was not reached") == ""

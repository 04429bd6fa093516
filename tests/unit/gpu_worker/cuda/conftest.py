"""The CUDA worker's parts on a CPU: its kernels run under Triton's interpreter, its runner without streams."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.unit.kernels.checks import repair_interpreter

repair_interpreter()


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)

"""Kernel tests run under Triton's interpreter where there is no GPU, and compiled where there is one."""

from __future__ import annotations

import pytest
import torch

from tests.unit.kernels.checks import repair_interpreter

repair_interpreter()


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)

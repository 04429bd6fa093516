"""Kernel tests run under Triton's interpreter where there is no GPU, and compiled where there is one."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    norm = sys.modules.get("stepwire_kernels.norm")
    if norm is not None and "Interpreted" not in type(norm._add_rms_norm_kernel).__name__:
        raise pytest.UsageError(
            "stepwire_kernels was imported before TRITON_INTERPRET was set; set it to 1 in tests/conftest.py"
        )

from tests.unit.kernels.checks import repair_interpreter

repair_interpreter()


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)

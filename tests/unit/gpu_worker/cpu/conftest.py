from __future__ import annotations

import pytest

from gpu_worker.cpu.compiling import CompiledKernels, load_kernels
from gpu_worker.cpu.team import Team


@pytest.fixture(scope="session")
def kernels() -> CompiledKernels:
    """Compiled once, and kept on disk for the next session."""
    return load_kernels()


@pytest.fixture(scope="session", params=[1, 3])
def team(request: pytest.FixtureRequest, kernels: CompiledKernels) -> Team:
    return Team(kernels, request.param)

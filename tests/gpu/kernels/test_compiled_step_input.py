"""The checks of tests/unit/kernels/test_step_input.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_step_input import *  # noqa: F403

pytestmark = pytest.mark.gpu

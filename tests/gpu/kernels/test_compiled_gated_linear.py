"""The checks of tests/unit/kernels/test_gated_linear.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_gated_linear import *  # noqa: F403

pytestmark = pytest.mark.gpu

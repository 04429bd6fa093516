"""The checks of tests/unit/kernels/test_philox.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_philox import *  # noqa: F403

pytestmark = pytest.mark.gpu

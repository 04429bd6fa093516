"""The checks of tests/unit/kernels/test_packed_ring.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_packed_ring import *  # noqa: F403

pytestmark = pytest.mark.gpu

"""The checks of tests/unit/kernels/test_packed_in_flight.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_packed_in_flight import *  # noqa: F403

pytestmark = pytest.mark.gpu

"""The checks of tests/unit/kernels/test_gated_delta.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_gated_delta import *  # noqa: F403

pytestmark = pytest.mark.gpu

"""The checks of tests/unit/kernels/test_activation_and_gather.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_activation_and_gather import *  # noqa: F403

pytestmark = pytest.mark.gpu

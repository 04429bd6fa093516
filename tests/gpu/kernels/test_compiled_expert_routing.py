"""The checks of tests/unit/kernels/test_expert_routing.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_expert_routing import *  # noqa: F403

pytestmark = pytest.mark.gpu

"""The checks of tests/unit/kernels/test_attention_fused.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_attention_fused import *  # noqa: F403

pytestmark = pytest.mark.gpu

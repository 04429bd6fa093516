"""The checks of tests/unit/kernels/test_attention_prefill.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_attention_prefill import *  # noqa: F403

pytestmark = pytest.mark.gpu

"""The checks of tests/unit/kernels/test_attention_decode.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_attention_decode import *  # noqa: F403

pytestmark = pytest.mark.gpu

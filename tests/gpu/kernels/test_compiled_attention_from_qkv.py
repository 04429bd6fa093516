"""The checks of tests/unit/kernels/test_attention_from_qkv.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_attention_from_qkv import *  # noqa: F403

pytestmark = pytest.mark.gpu

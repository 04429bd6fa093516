"""The checks of tests/unit/kernels/test_attention_latent.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_attention_latent import *  # noqa: F403

pytestmark = pytest.mark.gpu

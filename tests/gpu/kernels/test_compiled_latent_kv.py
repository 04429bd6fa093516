"""The checks of tests/unit/kernels/test_latent_kv.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_latent_kv import *  # noqa: F403

pytestmark = pytest.mark.gpu

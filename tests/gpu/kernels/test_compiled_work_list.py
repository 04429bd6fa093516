"""The checks of tests/unit/kernels/test_work_list.py, compiled."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_work_list import *  # noqa: F403

pytestmark = pytest.mark.gpu

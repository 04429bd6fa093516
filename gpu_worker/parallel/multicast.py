"""NVLink multicast stays off: nothing here needs it, and it can put a host's devices out of service."""

from __future__ import annotations

import os


def keep_multicast_off() -> None:
    """For this process and those it starts; before torch or NCCL see a second device."""
    # Written for libraries that ask nobody else.
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # noqa: TID251
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # noqa: TID251

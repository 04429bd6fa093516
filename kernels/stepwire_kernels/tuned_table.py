"""What was measured best, by device: `tuned/<device>.json`, made by `python -m load_tests.kernels.sweep`."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any


@functools.cache
def tuned_choices(device_name: str, name: str) -> tuple[dict[str, Any], ...]:
    """The rows of one list of the table for a device name as torch reports it; empty where there is none."""
    for entry in (resources.files("stepwire_kernels") / "tuned").iterdir():
        if not entry.name.endswith(".json"):
            continue
        data = json.loads(entry.read_text())
        if data["device"] in device_name:
            return tuple(data.get(name, ()))
    return ()

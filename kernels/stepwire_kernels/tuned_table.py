"""What was measured best, by device: `tuned/<device>.json`, made by the sweeps in `load_tests/kernels`."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

# Chips with the same multiprocessors and other memory: what a device's own table lacks is taken from its twin's.
TWINS = {"H200": "H100 80GB HBM3"}


@functools.cache
def tuned_choices(device_name: str, name: str) -> tuple[dict[str, Any], ...]:
    """The rows of one list of the table for a device name as torch reports it; empty where there is none."""
    tables = [
        json.loads(entry.read_text())
        for entry in (resources.files("stepwire_kernels") / "tuned").iterdir()
        if entry.name.endswith(".json")
    ]
    lists = {table["device"]: table.get(name, []) for table in tables}
    device = next((table["device"] for table in tables if table["device"] in device_name), None)
    if device is None:
        return ()
    own = lists[device]
    measured = {_shape(row) for row in own}
    lent = (row for row in lists.get(TWINS.get(device, ""), []) if _shape(row) not in measured)
    return (*own, *lent)


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("num_tokens", "n", "k", "gated"))

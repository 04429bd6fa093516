"""What was measured best, by device: the tables in `tuned/`, made by the sweeps in `load_tests/kernels`."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

Row = dict[str, Any]

# Chips with the same multiprocessors and other memory: what a device's own tables lack is taken from its twin's.
TWINS = {"H200": "H100 80GB HBM3"}


@functools.cache
def tuned_rows(device_name: str, name: str, group: tuple[str, ...], directory: str = "") -> tuple[Row, ...]:
    """The rows of one list in the tables of `tuned/<directory>` for a device name as torch reports it.

    Of rows that are alike in the fields of `group`, which were measured against one another, only the device's own
    count where it has any.
    """
    rows: list[Row] = []
    for device in (device_name, *(twin for card, twin in TWINS.items() if card in device_name)):
        known = {_values(row, group) for row in rows}
        rows += [row for row in _rows_of(device, name, directory) if _values(row, group) not in known]
    return tuple(rows)


def _rows_of(device_name: str, name: str, directory: str) -> list[Row]:
    entries = (resources.files("stepwire_kernels") / "tuned" / directory).iterdir()
    tables = [json.loads(entry.read_text()) for entry in entries if entry.name.endswith(".json")]
    return [row for table in tables if table["device"] in device_name for row in table.get(name, [])]


def _values(row: Row, fields: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(row.get(field) for field in fields)

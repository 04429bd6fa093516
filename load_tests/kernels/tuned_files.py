"""The measured tables beside the kernels, `stepwire_kernels/tuned/<device>.json`, as the sweeps read and write them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).resolve().parents[2] / "kernels" / "stepwire_kernels" / "tuned"
Row = dict[str, Any]


def device_name() -> str:
    return re.sub(r"^NVIDIA ", "", torch.cuda.get_device_name(0))


def table_name() -> str:
    """This device's file; one that ships keeps its name."""
    device = device_name()
    for path in TUNED.glob("*.json"):
        if json.loads(path.read_text())["device"] in device:
            return path.name
    return f"{_file_stem(device)}.json"


def write_rows(directory: Path, **lists: Sequence[Row]) -> Path:
    """Write this device's table with these rows in its lists, in place of those of the same shapes. Returns its path.

    All others stay, those of shapes that were measured again and won nothing among them: they are taken out by hand.
    """
    name = table_name()
    known = next((path for path in (directory / name, TUNED / name) if path.exists()), None)
    data = {"device": device_name(), "dtype": "bfloat16"} | (json.loads(known.read_text()) if known else {})
    for key, rows in lists.items():
        by_shape = {_shape(row): row for row in [*data.get(key, []), *rows]}
        data[key] = list(by_shape.values())
    parts = [f'"{key}": {json.dumps(value)}' for key, value in data.items() if not isinstance(value, list)]
    for key, rows in data.items():
        if isinstance(rows, list):
            lines = ",\n".join("  " + json.dumps(row) for row in rows)
            parts.append(f'"{key}": [\n{lines}\n]')
    target = directory / name
    target.write_text("{" + ", ".join(parts) + "}\n")
    return target


def show_choices(directory: Path, choices: Sequence[Row], part: str | None = None) -> None:
    """Write `choices` as this device's table in a directory of such tables, or as its part, and print it."""
    directory.mkdir(parents=True, exist_ok=True)
    device = device_name()
    target = directory / f"{_file_stem(device)}{'' if part is None else '.' + part}.json"
    lines = ",\n".join("  " + json.dumps(choice) for choice in choices)
    target.write_text(f'{{"device": "{device}", "dtype": "bfloat16", "choices": [\n{lines}\n]}}\n')
    print(f"{len(choices)} choices written to {target}:\n{lines}")


def _file_stem(device: str) -> str:
    return device.lower().replace(" ", "_")


def _shape(row: Row) -> tuple[object, ...]:
    return tuple(row.get(key) for key in ("num_tokens", "n", "k", "gated"))

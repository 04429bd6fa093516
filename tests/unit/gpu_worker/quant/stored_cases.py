"""Fixtures of several cases in one safetensors file: tensors are CASE/TENSOR, the metadata says what each case is."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

DIRECTORY = Path(__file__).resolve().parents[3] / "fixtures" / "quant"


@cache
def stored_cases(file_name: str, description: str) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """What the metadata's entry `description` says by case; tensors by case and name."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(DIRECTORY / file_name, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            case, _, tensor = name.partition("/")
            tensors.setdefault(case, {})[tensor] = file.get_tensor(name)
        return json.loads(file.metadata()[description]), tensors

"""Schemes that compressed-tensors knows by their names: `W4A16`, `FP8_DYNAMIC`, `NVFP4` and others.

Source: https://github.com/vllm-project/compressed-tensors (`PRESET_SCHEMES`).
"""

from __future__ import annotations

import re
from typing import Any

UNQUANTIZED = "UNQUANTIZED"
Scheme = dict[str, Any]


def _integers(bits: int, strategy: str, **more: Any) -> Scheme:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False} | more


def _floats(bits: int, strategy: str, **more: Any) -> Scheme:
    return _integers(bits, strategy, **more) | {"type": "float"}


_INT8_TOKENS = _integers(8, "token") | {"dynamic": True}
_FLOAT8_TOKENS = _floats(8, "token") | {"dynamic": True}
_NVFP4 = _floats(4, "tensor_group", group_size=16)
_MXFP4 = _floats(4, "group", group_size=32)
_MXFP8 = _floats(8, "group", group_size=32)
_PRESETS: dict[str, tuple[Scheme, Scheme | None]] = {
    "W4A16_ASYM": (_integers(4, "group", group_size=128) | {"symmetric": False}, None),
    "W8A8": (_integers(8, "channel"), _INT8_TOKENS),
    "INT8": (_integers(8, "channel"), _INT8_TOKENS),
    "W4AFP8": (_integers(4, "group", group_size=128), _FLOAT8_TOKENS),
    "FP8": (_floats(8, "tensor"), _floats(8, "tensor")),
    "FP8_DYNAMIC": (_floats(8, "channel"), _FLOAT8_TOKENS),
    "FP8_BLOCK": (
        _floats(8, "block", block_structure=[128, 128]),
        _floats(8, "group", group_size=128) | {"dynamic": True},
    ),
    "NVFP4A16": (_NVFP4, None),
    "NVFP4": (_NVFP4, _NVFP4 | {"dynamic": "local"}),
    "MXFP4A16": (_MXFP4, None),
    "MXFP4": (_MXFP4, _MXFP4 | {"dynamic": True}),
    "MXFP8A16": (_MXFP8, None),
    "MXFP8": (_MXFP8, _MXFP8 | {"dynamic": True}),
}
_OF_GROUPS = re.compile(r"W([2-8])A(4|8|16)")


def preset(name: str) -> Scheme | None:
    """`weights` and `input_activations` of a scheme; None: not known."""
    name = name.upper()
    found = _PRESETS.get(name)
    match = _OF_GROUPS.fullmatch(name)
    if found is None and match is not None and int(match[1]) <= int(match[2]):
        inputs = _integers(int(match[2]), "token") | {"dynamic": True}
        found = _integers(int(match[1]), "group", group_size=128), inputs if match[2] != "16" else None
    return None if found is None else {"weights": found[0], "input_activations": found[1]}

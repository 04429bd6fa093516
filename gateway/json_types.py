"""What a JSON value is called in a message to a person."""

from __future__ import annotations

from typing import Any

_NAMES = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}


def type_name(value: Any) -> str:
    if value is None:
        return "null"
    return _NAMES.get(type(value), "this")

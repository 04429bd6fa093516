"""What a tool's schema says of a value that a model writes outside of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

# References within references; a schema that goes round in circles says nothing.
_MAX_DEPTH = 16
_ALL = frozenset({"null", "boolean", "number", "integer", "string", "array", "object"})


class Written(Enum):
    """How a value stands between two marks."""

    # Bare: the value is a string, whatever it looks like.
    TEXT = "text"
    # Bare, and `null` is none.
    TEXT_OR_NULL = "text_or_null"
    JSON = "json"


def written_as(schema: Any, root: Mapping[str, Any]) -> Written:
    """root: the whole schema, in which references are looked up."""
    types = value_types(schema, root)
    if types == {"string"}:
        return Written.TEXT
    return Written.TEXT_OR_NULL if types == {"string", "null"} else Written.JSON


def value_types(schema: Any, root: Mapping[str, Any], depth: int = _MAX_DEPTH) -> frozenset[str]:
    """JSON Schema's names of the types that a value may have; all of them where nothing is said."""
    if not isinstance(schema, Mapping) or not depth:
        return _ALL
    types = _ALL
    declared = schema.get("type")
    if isinstance(declared, str):
        types &= {declared}
    elif isinstance(declared, list):
        types &= {each for each in declared if isinstance(each, str)}
    if isinstance(schema.get("enum"), list):
        types &= {type_of(value) for value in schema["enum"]}
    if "const" in schema:
        types &= {type_of(schema["const"])}
    if isinstance(schema.get("$ref"), str):
        types &= value_types(resolved(schema["$ref"], root), root, depth - 1)
    for keyword in ("anyOf", "oneOf"):
        branches = schema.get(keyword)
        if isinstance(branches, list):
            types &= frozenset().union(*(value_types(each, root, depth - 1) for each in branches))
    branches = schema.get("allOf")
    for branch in branches if isinstance(branches, list) else ():
        types &= value_types(branch, root, depth - 1)
    return types


def resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """What `#/...` refers to within the schema; None where there is nothing."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for part in filter(None, reference[1:].split("/")):
        key = part.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def top_level(root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that the whole arguments have, behind a `$ref` at the top."""
    schema: Any = root
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            break
        schema = resolved(schema["$ref"], root)
    return schema if isinstance(schema, Mapping) else {}

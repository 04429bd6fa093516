"""`structural_tag` in both forms that clients send: `structures` with `triggers`, and a `format` made of formats.

The second is xgrammar's (https://xgrammar.mlc.ai/docs/tutorials/structural_tag.html), which vLLM's users send as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson
from stepwire.v1 import inference_pb2

from gateway.errors import ApiError

# Up to three messages each: protobuf reads at most a hundred within each other.
_MAX_DEPTH = 24
_TAG_MEMBERS = ("begin", "content", "end")
_MEMBERS: Mapping[str, tuple[str, ...]] = {
    "const_string": ("value",),
    "json_schema": ("json_schema",),
    "qwen_xml_parameter": ("json_schema",),
    "regex": ("pattern",),
    "grammar": ("grammar",),
    "any_text": ("excludes", "excluded_str"),
    "sequence": ("elements",),
    "or": ("elements",),
    "tag": _TAG_MEMBERS,
    "triggered_tags": ("triggers", "tags", "at_least_one", "stop_after_first", "excludes"),
    "tags_with_separator": ("tags", "separator", "at_least_one", "stop_after_first"),
}


def read_structural_tag(param: str, value: Any) -> inference_pb2.StructuredOutput:
    """Raises `ApiError`."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except ValueError as error:
            raise ApiError(400, f"{param}: is not valid JSON: {error}.", param=param) from error
    if not isinstance(value, dict):
        raise _wrong(param, "must be an object")
    if value.get("format") is not None:
        return inference_pb2.StructuredOutput(text_format=_format(f"{param}.format", value["format"], 1))
    return inference_pb2.StructuredOutput(structural_tags=_structures(param, value))


def schema_text(param: str, schema: Any) -> str:
    """A schema as JSON text; clients send it as an object or as text."""
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, dict | bool):
        raise _wrong(param, "must be a JSON Schema (an object, or its text)")
    return json.dumps(schema, ensure_ascii=False)


def _structures(param: str, value: Mapping[str, Any]) -> inference_pb2.StructuralTags:
    tags = value.get("structures")
    if not isinstance(tags, list) or not all(isinstance(tag, dict) for tag in tags):
        raise _wrong(f"{param}.structures", "needed: a list of objects with begin, schema and end; or give a format")
    message = inference_pb2.StructuralTags(triggers=_texts(param, value, "triggers"))
    for index, tag in enumerate(tags):
        where = f"{param}.structures[{index}]"
        schema = schema_text(f"{where}.schema", tag.get("schema", {}))
        message.tags.add(begin=_text(where, tag, "begin"), end=_text(where, tag, "end", ""), json_schema=schema)
    return message


def _format(param: str, value: Any, depth: int) -> inference_pb2.TextFormat:
    if depth > _MAX_DEPTH:
        raise _wrong(param, f"nests formats more than {_MAX_DEPTH} deep")
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _MEMBERS:
        raise _wrong(f"{param}.type", f"must be one of {', '.join(_MEMBERS)}")
    _check_members(param, value, _MEMBERS[kind])
    message = inference_pb2.TextFormat()
    match kind:
        case "const_string":
            message.const_string = _text(param, value, "value")
        case "json_schema":
            message.json_schema = schema_text(f"{param}.json_schema", value.get("json_schema"))
        case "qwen_xml_parameter":
            message.qwen_parameters = schema_text(f"{param}.json_schema", value.get("json_schema"))
        case "regex":
            message.regex = _text(param, value, "pattern")
        case "grammar":
            message.grammar.text = _text(param, value, "grammar")
        case "any_text":
            message.any_text.excluded.extend(_texts(param, value, "excludes") + _texts(param, value, "excluded_str"))
        case "sequence" | "or":
            target = message.sequence if kind == "sequence" else message.any_of
            target.SetInParent()
            for index, each in enumerate(_list(param, value, "elements")):
                target.formats.append(_format(f"{param}.elements[{index}]", each, depth + 1))
        case "tag":
            message.tag.CopyFrom(_tag(param, value, depth))
        case "triggered_tags":
            triggered = message.triggered_tags
            triggered.tags.extend(_tags(param, value, depth))
            triggered.triggers.extend(_texts(param, value, "triggers"))
            triggered.excluded.extend(_texts(param, value, "excludes"))
            triggered.at_least_one = _flag(param, value, "at_least_one")
            triggered.stop_after_first = _flag(param, value, "stop_after_first")
        case _:
            separated = message.separated_tags
            separated.tags.extend(_tags(param, value, depth))
            separated.separator = _text(param, value, "separator", "")
            separated.at_least_one = _flag(param, value, "at_least_one")
            separated.stop_after_first = _flag(param, value, "stop_after_first")
    return message


def _tags(param: str, value: Mapping[str, Any], depth: int) -> list[inference_pb2.FormatTag]:
    tags = []
    for index, each in enumerate(_list(param, value, "tags")):
        where = f"{param}.tags[{index}]"
        if not isinstance(each, dict) or each.get("type", "tag") != "tag":
            raise _wrong(where, f"must be an object with {', '.join(_TAG_MEMBERS)}")
        _check_members(where, each, _TAG_MEMBERS)
        tags.append(_tag(where, each, depth))
    return tags


def _tag(param: str, value: Mapping[str, Any], depth: int) -> inference_pb2.FormatTag:
    content = _format(f"{param}.content", value.get("content"), depth + 1)
    return inference_pb2.FormatTag(
        begin=_text(param, value, "begin"), content=content, end=_text(param, value, "end", "")
    )


def _check_members(param: str, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """What is not known would change what the text is held to."""
    for name, given in value.items():
        if name != "type" and name not in known and given is not None:
            raise _wrong(f"{param}.{name}", f"not supported; a format of this type has {', '.join(known)}")


def _text(param: str, value: Mapping[str, Any], name: str, default: str | None = None) -> str:
    text = value.get(name, default)
    if not isinstance(text, str):
        raise _wrong(f"{param}.{name}", "must be a string")
    return text


def _list(param: str, value: Mapping[str, Any], name: str) -> list[Any]:
    items = value.get(name)
    if not isinstance(items, list):
        raise _wrong(f"{param}.{name}", "must be a list")
    return items


def _texts(param: str, value: Mapping[str, Any], name: str) -> list[str]:
    if value.get(name) is None:
        return []
    texts = _list(param, value, name)
    if not all(isinstance(text, str) for text in texts):
        raise _wrong(f"{param}.{name}", "must be a list of strings")
    return texts


def _flag(param: str, value: Mapping[str, Any], name: str) -> bool:
    flag = value.get(name)
    if flag is not None and not isinstance(flag, bool):
        raise _wrong(f"{param}.{name}", "must be true or false")
    return bool(flag)


def _wrong(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param}: {what}.", param=param)

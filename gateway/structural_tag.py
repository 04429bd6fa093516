"""`structural_tag` in both forms that clients send: `structures` with `triggers`, and a `format` made of formats.

The second is xgrammar's (https://xgrammar.mlc.ai/docs/structural_tag/structural_tag.html), which vLLM's users send as
it is.
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
    "json_schema": ("json_schema", "style", "any_order"),
    "qwen_xml_parameter": ("json_schema",),
    "regex": ("pattern",),
    "grammar": ("grammar",),
    "any_text": ("excludes", "excluded_str"),
    "token": ("token",),
    "exclude_token": ("exclude_tokens",),
    "any_tokens": ("exclude_tokens", "max_tokens"),
    "sequence": ("elements",),
    "or": ("elements",),
    "optional": ("content",),
    "plus": ("content",),
    "star": ("content",),
    "repeat": ("min", "max", "content"),
    "tag": _TAG_MEMBERS,
    "triggered_tags": ("triggers", "tags", "at_least_one", "stop_after_first", "excludes"),
    "token_triggered_tags": ("trigger_tokens", "tags", "at_least_one", "stop_after_first", "exclude_tokens"),
    "tags_with_separator": ("tags", "separator", "at_least_one", "stop_after_first"),
    "dispatch": ("rules", "loop", "excludes"),
    "token_dispatch": ("rules", "loop", "exclude_tokens"),
}
# (least, most) times; None: no limit.
_TIMES: Mapping[str, tuple[int, int | None]] = {"optional": (0, 1), "plus": (1, None), "star": (0, None)}
_STYLES = ("json", "qwen_xml")
_MAX_UINT32 = 2**32 - 1


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
        case "sequence" | "or":
            target = message.sequence if kind == "sequence" else message.any_of
            target.SetInParent()
            for index, each in enumerate(_list(param, value, "elements")):
                target.formats.append(_format(f"{param}.elements[{index}]", each, depth + 1))
        case "optional" | "plus" | "star" | "repeat":
            message.repeat.CopyFrom(_repeat(param, value, kind, depth))
        case "tag":
            message.tag.CopyFrom(_tag(param, value, depth))
        case "triggered_tags" | "token_triggered_tags" | "tags_with_separator":
            _read_tags(message, param, value, kind, depth)
        case "dispatch" | "token_dispatch":
            _read_dispatch(message, param, value, kind, depth)
        case "token" | "exclude_token" | "any_tokens":
            _read_tokens(message, param, value, kind)
        case _:
            _read_text(message, param, value, kind)
    return message


def _read_text(message: inference_pb2.TextFormat, param: str, value: Mapping[str, Any], kind: str) -> None:
    match kind:
        case "const_string":
            message.const_string = _text(param, value, "value")
        case "json_schema" | "qwen_xml_parameter":
            style = value.get("style") or "json"
            if style not in _STYLES:
                raise _wrong(f"{param}.style", f"not supported; must be one of {', '.join(_STYLES)}")
            if kind == "json_schema" and _flag(param, value, "any_order"):
                raise _wrong(f"{param}.any_order", "not supported; properties come in the schema's order")
            schema = schema_text(f"{param}.json_schema", value.get("json_schema"))
            if kind == "qwen_xml_parameter" or style == "qwen_xml":
                message.qwen_parameters = schema
            else:
                message.json_schema = schema
        case "regex":
            message.regex = _text(param, value, "pattern")
        case "grammar":
            message.grammar.text = _text(param, value, "grammar")
        case _:
            message.any_text.excluded.extend(_texts(param, value, "excludes") + _texts(param, value, "excluded_str"))


def _read_tokens(message: inference_pb2.TextFormat, param: str, value: Mapping[str, Any], kind: str) -> None:
    match kind:
        case "token":
            message.token.CopyFrom(_token(f"{param}.token", value.get("token")))
        case "exclude_token":
            message.any_token.SetInParent()
            message.any_token.excluded.extend(_tokens(param, value, "exclude_tokens"))
        case _:
            message.any_tokens.SetInParent()
            message.any_tokens.excluded.extend(_tokens(param, value, "exclude_tokens"))
            if value.get("max_tokens") is not None:
                message.any_tokens.max_tokens = _count(param, value, "max_tokens")


def _repeat(param: str, value: Mapping[str, Any], kind: str, depth: int) -> inference_pb2.RepeatedFormat:
    message = inference_pb2.RepeatedFormat(format=_format(f"{param}.content", value.get("content"), depth + 1))
    if kind == "repeat":
        most = None if value.get("max") == -1 else _count(param, value, "max")
        least = _count(param, value, "min")
        if most is not None and most < least:
            raise _wrong(f"{param}.max", "must be at least min, or -1 for no limit")
    else:
        least, most = _TIMES[kind]
    message.min = least
    if most is not None:
        message.max = most
    return message


def _read_tags(message: inference_pb2.TextFormat, param: str, value: Mapping[str, Any], kind: str, depth: int) -> None:
    tags = _tags(param, value, depth)
    for index, tag in enumerate(tags):
        if kind != "tags_with_separator" and tag.HasField("begin_token") != (kind == "token_triggered_tags"):
            needed = "a string" if kind == "triggered_tags" else "a format of type token"
            raise _wrong(f"{param}.tags[{index}].begin", f"must be {needed} in {kind}")
    flags = {name: _flag(param, value, name) for name in ("at_least_one", "stop_after_first")}
    match kind:
        case "triggered_tags":
            message.triggered_tags.CopyFrom(
                inference_pb2.TriggeredTags(
                    tags=tags,
                    triggers=_texts(param, value, "triggers"),
                    excluded=_texts(param, value, "excludes"),
                    **flags,
                )
            )
        case "token_triggered_tags":
            message.token_triggered_tags.CopyFrom(
                inference_pb2.TokenTriggeredTags(
                    tags=tags,
                    trigger_tokens=_tokens(param, value, "trigger_tokens"),
                    excluded=_tokens(param, value, "exclude_tokens"),
                    **flags,
                )
            )
        case _:
            separator = _text(param, value, "separator", "")
            message.separated_tags.CopyFrom(inference_pb2.SeparatedTags(tags=tags, separator=separator, **flags))


def _read_dispatch(
    message: inference_pb2.TextFormat, param: str, value: Mapping[str, Any], kind: str, depth: int
) -> None:
    """Rules are tags that nothing closes."""
    tags = []
    for index, rule in enumerate(_list(param, value, "rules")):
        where = f"{param}.rules[{index}]"
        if not isinstance(rule, list) or len(rule) != 2:
            raise _wrong(where, "must be a list of two: what begins it, and a format")
        tag = inference_pb2.FormatTag(content=_format(f"{where}[1]", rule[1], depth + 1))
        if kind == "token_dispatch":
            tag.begin_token.CopyFrom(_token(f"{where}[0]", rule[0]))
        elif isinstance(rule[0], str):
            tag.begin = rule[0]
        else:
            raise _wrong(f"{where}[0]", "must be a string")
        tags.append(tag)
    is_once = not _flag(param, value, "loop", default=True)
    if kind == "dispatch":
        excluded = _texts(param, value, "excludes")
        message.triggered_tags.CopyFrom(
            inference_pb2.TriggeredTags(tags=tags, excluded=excluded, stop_after_first=is_once)
        )
    else:
        tokens = _tokens(param, value, "exclude_tokens")
        message.token_triggered_tags.CopyFrom(
            inference_pb2.TokenTriggeredTags(tags=tags, excluded=tokens, stop_after_first=is_once)
        )


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
    tag = inference_pb2.FormatTag(content=_format(f"{param}.content", value.get("content"), depth + 1))
    begin, end = value.get("begin"), value.get("end", "")
    if isinstance(begin, dict):
        tag.begin_token.CopyFrom(_token_format(f"{param}.begin", begin))
    elif isinstance(begin, str):
        tag.begin = begin
    else:
        raise _wrong(f"{param}.begin", "must be a string or a format of type token")
    if isinstance(end, dict):
        tag.end_token.CopyFrom(_token_format(f"{param}.end", end))
    elif isinstance(end, str):
        tag.end = end
    elif isinstance(end, list) and end and all(isinstance(each, str) for each in end):
        if len(end) > 1 and not all(end):
            raise _wrong(f"{param}.end", "none of several may be empty")
        tag.end = end[0]
        tag.other_ends.extend(end[1:])
    else:
        raise _wrong(f"{param}.end", "must be a string, a list of strings or a format of type token")
    return tag


def _token_format(param: str, value: Mapping[str, Any]) -> inference_pb2.NamedToken:
    if value.get("type") != "token":
        raise _wrong(f"{param}.type", "must be token")
    _check_members(param, value, _MEMBERS["token"])
    return _token(f"{param}.token", value.get("token"))


def _token(param: str, value: Any) -> inference_pb2.NamedToken:
    if isinstance(value, str):
        return inference_pb2.NamedToken(text=value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_UINT32:
        raise _wrong(param, "must be a token's id or its text")
    return inference_pb2.NamedToken(id=value)


def _tokens(param: str, value: Mapping[str, Any], name: str) -> list[inference_pb2.NamedToken]:
    if value.get(name) is None:
        return []
    return [_token(f"{param}.{name}[{index}]", each) for index, each in enumerate(_list(param, value, name))]


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


def _count(param: str, value: Mapping[str, Any], name: str) -> int:
    count = value.get(name)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _MAX_UINT32:
        raise _wrong(f"{param}.{name}", "must be a whole number, and no less than 0")
    return count


def _flag(param: str, value: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    flag = value.get(name)
    if flag is not None and not isinstance(flag, bool):
        raise _wrong(f"{param}.{name}", "must be true or false")
    return default if flag is None else flag


def _wrong(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param}: {what}.", param=param)

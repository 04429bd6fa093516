"""`response_format`, `structured_outputs` and the older `guided_*` fields to one StructuredOutput message."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stepwire.v1 import inference_pb2

from gateway.errors import ApiError
from gateway.schemas import GenerationBody, ResponseFormat, StructuredOutputs


def read_structured_output(
    body: GenerationBody,
) -> tuple[inference_pb2.StructuredOutput | None, Mapping[str, str]]:
    """The format asked for, if any, and what its fields are called in this body. Raises `ApiError`."""
    asked: dict[str, Any] = {}
    if body.response_format is not None and body.response_format.type != "text":
        asked["response_format"] = body.response_format
    if body.structured_outputs is not None and body.structured_outputs.model_fields_set:
        asked["structured_outputs"] = body.structured_outputs
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        value = getattr(body, name)
        if value is not None:
            asked[name] = value
    if not asked:
        return None, {}
    if len(asked) > 1:
        first, second, *_ = asked
        raise ApiError(400, f"{second}: cannot be used together with {first}.", param=second)
    ((name, value),) = asked.items()
    if isinstance(value, ResponseFormat):
        return _of_response_format(value)
    if isinstance(value, StructuredOutputs):
        return _of_structured_outputs(value)
    return _of_constraint(name, name.removeprefix("guided_"), value)


def schema_text(param: str, schema: Any) -> str:
    """A schema as JSON text; clients send it as an object or as text."""
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, dict | bool):
        raise ApiError(400, f"{param}: must be a JSON Schema (an object, or its text).", param=param)
    return json.dumps(schema, ensure_ascii=False)


def _of_response_format(value: ResponseFormat) -> tuple[inference_pb2.StructuredOutput, Mapping[str, str]]:
    if value.type == "structural_tag":
        return _of_constraint("response_format", "structural_tag", {"type": value.type, **(value.model_extra or {})})
    if value.type == "json_object":
        return inference_pb2.StructuredOutput(json_object=inference_pb2.JsonObject()), {
            "structured_output": "response_format"
        }
    param = "response_format.json_schema"
    if value.json_schema is None:
        raise ApiError(400, f"{param}: needed when type is 'json_schema'.", param=param)
    message = inference_pb2.StructuredOutput()
    if value.json_schema.json_schema is None:
        message.json_object.SetInParent()
    else:
        message.json_schema = schema_text(f"{param}.schema", value.json_schema.json_schema)
    return message, {"structured_output.json_schema": f"{param}.schema", "structured_output": "response_format"}


def _of_structured_outputs(value: StructuredOutputs) -> tuple[inference_pb2.StructuredOutput, Mapping[str, str]]:
    constraints = {
        "json": value.json_,
        "regex": value.regex,
        "choice": value.choice,
        "grammar": value.grammar,
        "json_object": value.json_object or None,
        "structural_tag": value.structural_tag,
    }
    given = {kind: constraint for kind, constraint in constraints.items() if constraint is not None}
    if len(given) != 1:
        found = f"not {', '.join(given)}" if given else "and none is given"
        raise ApiError(
            400,
            f"structured_outputs: exactly one of {', '.join(constraints)} is taken, {found}.",
            param="structured_outputs",
        )
    ((kind, constraint),) = given.items()
    message, renames = _of_constraint(f"structured_outputs.{kind}", kind, constraint)
    message.compact_json = bool(value.disable_any_whitespace)
    return message, renames


def _of_constraint(param: str, kind: str, value: Any) -> tuple[inference_pb2.StructuredOutput, Mapping[str, str]]:
    message = inference_pb2.StructuredOutput()
    match kind:
        case "json":
            message.json_schema = schema_text(param, value)
            field = "json_schema"
        case "regex":
            message.regex = value
            field = "regex"
        case "choice":
            message.choice.texts.extend(value)
            field = "choice.texts"
        case "grammar":
            message.grammar.text = value
            field = "grammar.text"
        case "json_object":
            message.json_object.SetInParent()
            field = "json_object"
        case _:
            message.structural_tags.CopyFrom(_structural_tags(param, value))
            field = "structural_tags"
    whole = field.partition(".")[0]
    return message, {
        f"structured_output.{field}": param,
        f"structured_output.{whole}": param,
        "structured_output": param,
    }


def _structural_tags(param: str, value: Any) -> inference_pb2.StructuralTags:
    """Both spellings in use: `structures` with `triggers`, and a `format` of type `triggered_tags`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"{param}: is not valid JSON: {error}.", param=param) from error
    if not isinstance(value, dict):
        raise ApiError(400, f"{param}: must be an object.", param=param)
    layout = value.get("format")
    if isinstance(layout, dict):
        if layout.get("type") != "triggered_tags":
            raise ApiError(400, f"{param}.format.type: only 'triggered_tags' is supported.", param=f"{param}.format")
        tags, triggers = layout.get("tags"), layout.get("triggers")
        tags = [_flat_tag(tag) for tag in tags] if isinstance(tags, list) else None
    else:
        tags, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(tags, list) or not all(isinstance(tag, dict) for tag in tags):
        raise ApiError(400, f"{param}.structures: needed: a list of objects with begin, schema and end.", param=param)
    message = inference_pb2.StructuralTags()
    for index, tag in enumerate(tags):
        where = f"{param}.structures[{index}]"
        begin, end = tag.get("begin"), tag.get("end", "")
        if not isinstance(begin, str) or not isinstance(end, str):
            raise ApiError(400, f"{where}: begin and end must be strings.", param=where)
        schema = schema_text(f"{where}.schema", tag.get("schema", {}))
        message.tags.add(begin=begin, end=end, json_schema=schema)
    if triggers is not None:
        if not isinstance(triggers, list) or not all(isinstance(trigger, str) for trigger in triggers):
            raise ApiError(400, f"{param}.triggers: must be a list of strings.", param=f"{param}.triggers")
        message.triggers.extend(triggers)
    return message


def _flat_tag(tag: Any) -> Any:
    content = tag.get("content") if isinstance(tag, dict) else None
    if not isinstance(content, dict) or content.get("type") != "json_schema":
        return None
    return {"begin": tag.get("begin"), "schema": content.get("json_schema", {}), "end": tag.get("end", "")}
